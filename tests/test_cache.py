"""A step of which nothing has changed is not run again, and one of which anything has is. Steps are real kernels."""

import json
import shutil
import threading
from pathlib import Path

import pandas as pd
import pytest

from mlpkg.data.lake import Lake
from mlpkg.data.pins import pins
from mlpkg.data.upkeep import compact
from mlpkg.steps.execution import StepError
from mlpkg.steps.record import Caching, read_record
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import open_pipeline_run
from mlpkg.steps.why import explain
from mlpkg.testing import write_notebook

SUM = """import pandas as pd
import scrapbook as sb
import fares
from mlpkg.data.lake import open_lake
lake = open_lake()
rows = lake.read("raw/parcels")
lake.write("sum/parcels", pd.DataFrame({"x": [len(rows) * fares.fare * factor]}), mode="overwrite")
sb.glue("total", len(rows) * fares.fare * factor)"""


@pytest.fixture
def store(project):
    "A project with a table, a module, and a step that makes another table of both"
    project.step = project.notebook("10_sum", "factor: int = 1", SUM)
    (project.root / "notebooks" / "fares.py").write_text("from rates import rate\nfare = 2 * rate")
    (project.root / "notebooks" / "rates.py").write_text("rate = 1")
    project.lake = Lake(project.settings.lake.root, run="")
    project.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    project.count = 0
    return project


def dag_run(store) -> str:
    store.count += 1
    return open_pipeline_run(store.mlflow, store.settings, "parcels", f"run {store.count}")


def run(store, notebook=None, parent=None, env=(), elsewhere=False, **parameters):
    "Run a step in a new DAG run; the scraps, and the MLflow run"
    parent = parent or dag_run(store)
    how = {"caching": Caching(True, tuple(env), elsewhere), "settings": store.settings}
    result = run_step(notebook or store.step, parameters, parent=parent, **how)
    return result.scraps, store.mlflow.get_run(result.run_id)


def hit(found) -> bool:
    return "mlpkg.cached_from" in found[1].data.tags


def said(store, found) -> str:
    return "\n".join(explain(store.mlflow, found[1]))


def source(store, old: str, new: str) -> None:
    "Change the code cell of the step"
    store.notebook("10_sum", "factor: int = 1", SUM.replace(old, new))


def test_an_unchanged_step_is_not_run_and_leaves_what_it_would_have_left(store):
    scraps, first = run(store)
    parent = dag_run(store)
    again, second = found = run(store, parent=parent)
    assert hit(found) and again == scraps == {"total": 10}
    assert second.info.status == "FINISHED" and second.data.metrics["total"] == 10
    assert second.data.tags["mlpkg.cached_from"] == first.info.run_id
    assert second.data.params == first.data.params and second.data.metrics["seconds"] < first.data.metrics["seconds"]
    used = lambda run: {(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs}  # noqa: E731
    assert used(second) == used(first) == {("raw/parcels", "v0"), ("sum/parcels", "v0")}
    lines = pins(Lake(f"{store.lake.root}/_runs", run=""), parent).read()[0]
    assert {line["table"]: line["version"] for line in lines} == {"raw/parcels": 0, "sum/parcels": 0}
    assert store.lake.version("sum/parcels") == 0, "nothing was written again"
    assert "stands in" in said(store, found)
    assert store.look("notebook", parent, "sum") == store.look("notebook", first.data.tags["mlflow.parentRunId"], "sum")
    assert "nothing that it depends on had changed" in store.look("why", parent, "sum")
    third = run(store)
    assert third[1].data.tags["mlpkg.cached_from"] == first.info.run_id, "the next one refers to what really ran"


def test_prose_does_not_count_and_code_does(store):
    run(store)
    nb = json.loads(store.step.read_text())
    nb["cells"].insert(1, {"cell_type": "markdown", "id": "why", "metadata": {}, "source": "Why we count."})
    store.step.write_text(json.dumps(nb))
    assert hit(run(store))
    source(store, "import fares", "import fares\nprint('more')")
    found = run(store)
    assert not hit(found) and "code cell 2 differs" in said(store, found) and "+print('more')" in said(store, found)


def test_a_parameter_counts_and_a_default_that_is_given_does_not(store):
    run(store)
    assert hit(run(store, factor=1))
    found = run(store, factor=3)
    assert not hit(found) and "parameter factor was 1, is 3" in said(store, found)


def test_a_module_counts_also_one_that_a_module_imports(store):
    run(store)
    (store.root / "notebooks" / "rates.py").write_text("rate = 7")
    found = run(store)
    assert not hit(found) and found[0] == {"total": 70}
    assert "module notebooks/rates.py" in said(store, found)
    (store.root / "notebooks" / "rates.py").write_text("rate = 1")
    found = run(store)
    assert not hit(found), "its table was written with the other rate meanwhile"
    assert "somebody has written to it after version 0" in said(store, found)


def test_a_new_version_of_a_table_counts_but_not_its_upkeep(store):
    for _ in range(3):
        store.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    run(store)
    assert compact(store.lake, "raw/parcels", more_than=1).count == 4
    assert hit(run(store)), "compaction keeps the rows"
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    found = run(store)
    assert not hit(found) and "table raw/parcels was version 3, is version" in said(store, found)


def test_a_dag_run_that_is_pinned_to_an_older_version_reads_that_one(store):
    run(store)
    parent = dag_run(store)
    Lake(store.lake.root, run=parent).version("raw/parcels")
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    assert hit(run(store, parent=parent))
    assert not hit(run(store))


def test_another_version_of_the_same_number_in_a_restored_lake_counts(store):
    table, backup = Path(store.lake.root) / "raw/parcels", store.root / "backup"
    shutil.copytree(table, backup)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": [5]}))
    parent = dag_run(store)
    assert run(store, parent=parent)[0] == {"total": 12}
    shutil.rmtree(table)
    shutil.copytree(backup, table)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": [5, 6]}))
    anew = run(store)
    assert not hit(anew) and anew[0] == {"total": 14}
    assert "table 'raw/parcels': version 1 is another one now" in said(store, anew)
    assert "table raw/parcels: version 1 is another one than that which was read then" in said(store, anew)
    assert hit(run(store))
    with pytest.raises(StepError, match="Start a new DAG run"):  # which is pinned to what is not there any more
        run(store, parent=parent)


def test_a_dag_run_whose_version_is_gone_reuses_nothing_that_was_recorded_without_marks(store):
    table, backup = Path(store.lake.root) / "raw/parcels", store.root / "backup"
    shutil.copytree(table, backup)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": [5]}))
    parent = dag_run(store)
    run(store, parent=parent)
    shutil.rmtree(table)
    shutil.copytree(backup, table)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": [5, 6]}))
    _, earlier = run(store)
    record = read_record(earlier)
    for use in [*record["tables"]["reads"], *record["tables"]["writes"].values()]:
        del use["mark"]
    store.mlflow.log_text(earlier.info.run_id, json.dumps(record), "cache/record.json")
    assert hit(run(store))
    with pytest.raises(StepError, match="Start a new DAG run"):
        run(store, parent=parent)


def test_somebody_who_writes_to_its_table_later_makes_it_run(store):
    run(store)
    store.lake.write("sum/parcels", pd.DataFrame({"x": [0]}), mode="overwrite")
    found = run(store)
    assert not hit(found) and "somebody has written to it after version 0" in said(store, found)
    assert store.lake.read("sum/parcels")["x"].tolist() == [10]


def test_a_declared_variable_counts(store, monkeypatch):
    monkeypatch.setenv("FARES", "high")
    run(store, env=["FARES"])
    assert hit(run(store, env=["FARES"]))
    monkeypatch.setenv("FARES", "low")
    found = run(store, env=["FARES"])
    assert not hit(found) and "environment variable FARES differs" in said(store, found)


def test_what_is_installed_counts_and_the_lock_is_only_told(store, tmp_path, monkeypatch):
    about = tmp_path / "parcelfares-1.0.dist-info"
    about.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    lock = store.root / "requirements.lock"
    lock.write_text("parcelfares==1.0\n")
    run(store)
    lock.write_text("parcelfares==2.0\n")
    assert hit(run(store)), "nothing was installed"
    about.rename(tmp_path / "parcelfares-2.0.dist-info")
    found = run(store)
    assert not hit(found) and "package parcelfares was 1.0, is 2.0" in said(store, found)
    assert "locked package parcelfares was 1.0, is 2.0" in said(store, found)


def test_a_secret_counts_and_is_not_kept(store, monkeypatch):
    monkeypatch.setenv("FARES_PASSWORD", "swordfish")
    first = run(store, env=["FARES_PASSWORD"])
    assert read_record(first[1])["about"]["env"]["FARES_PASSWORD"] == "secret"
    monkeypatch.setenv("FARES_PASSWORD", "marlin")
    found = run(store, env=["FARES_PASSWORD"])
    assert not hit(found) and "a secret that is not kept differs: FARES_PASSWORD" in said(store, found)


def test_two_checkouts_that_share_a_store_do_not_share_their_modules(store, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, rate in ((here, 1), (there, 7)):
        shutil.copytree(store.root / "notebooks", folder / "notebooks")
        (folder / ".git").mkdir()
        (folder / "notebooks" / "rates.py").write_text(f"rate = {rate}")
    first = run(store, here / "notebooks" / "10_sum.ipynb")
    assert hit(run(store, here / "notebooks" / "10_sum.ipynb"))
    found = run(store, there / "notebooks" / "10_sum.ipynb")
    assert not hit(found) and (first[0], found[0]) == ({"total": 10}, {"total": 70})
    assert "module notebooks/rates.py has changed" in said(store, found)


def test_a_failed_run_is_never_reused(store):
    source(store, 'sb.glue("total"', 'raise RuntimeError("once")\nsb.glue("total"')
    with pytest.raises(StepError, match="once"):
        run(store)
    store.notebook("10_sum", "factor: int = 1", SUM)
    first = run(store)
    assert not hit(first) and "was FAILED: nothing is reused from such a run" in said(store, first)
    assert hit(run(store))


def test_a_run_of_uncommitted_code_is_never_reused(store):
    first = run(store)
    store.mlflow.set_tag(first[1].info.run_id, "mlpkg.git_dirty", "true")
    found = run(store)
    assert not hit(found) and "its code was not committed" in said(store, found)
    assert "never reused" in said(store, found)


@pytest.mark.parametrize("gone", ["cache/record.json", "notebook/sum.ipynb", "", "run"])
def test_a_run_whose_artifacts_are_gone_is_not_reused(store, gone):
    first = run(store)[1].info
    if gone == "run":
        store.mlflow.delete_run(first.run_id)
    else:
        path = Path(first.artifact_uri.removeprefix("file://")) / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = run(store)
    assert not hit(found) and found[1].info.status == "FINISHED"
    why = "no earlier run that finished" if gone == "run" else "gone"
    assert why in found[1].data.tags["mlpkg.cache.miss"]
    assert hit(run(store)), "the run that has just run can stand in"


WRITE = """from pathlib import Path
import scrapbook as sb
Path(target).write_text("x")
sb.glue("done", 1)"""


def test_a_step_that_writes_elsewhere_is_not_reused_unless_it_says_so(store, tmp_path):
    target = store.root / "report.txt"
    step = store.notebook("30_report", f"target: str = '{target}'", WRITE)
    first = run(store, step)
    found = run(store, step)
    assert not hit(found)
    assert f"it wrote {target}, outside of lake and MLflow (cache_elsewhere=True" in said(store, found)
    assert first[1].data.tags["mlpkg.cache.refused"].startswith(f"it wrote {target}")
    run(store, step, elsewhere=True)
    assert hit(run(store, step, elsewhere=True))


def test_a_file_that_was_read_counts(store):
    (store.root / "list.txt").write_text("a")
    code = f"import scrapbook as sb\nsb.glue('list', open('{store.root}/list.txt').read())"
    step = store.notebook("30_list", "n: int = 1", code)
    assert run(store, step)[0] == {"list": "a"}
    second = run(store, step)
    assert hit(second), {n: v for n, v in second[1].data.tags.items() if "cache" in n}
    (store.root / "list.txt").write_text("b")
    found = run(store, step)
    assert found[0] == {"list": "b"} and "file list.txt differs" in said(store, found)


def test_a_step_that_is_not_declared_is_neither_reused_nor_reuses(store):
    parent = dag_run(store)
    plain = lambda: run_step(store.step, {}, parent=parent, settings=store.settings)  # noqa: E731
    plain()
    assert not hit(run(store)), "nobody watched what the first one wrote"
    again = store.mlflow.get_run(plain().run_id)
    assert "mlpkg.cached_from" not in again.data.tags
    told = explain(store.mlflow, again)
    assert any("nothing differs" in line for line in told), told


def test_two_dag_runs_at_the_same_time_do_not_disturb_each_other(store):
    run(store)
    parents, found = [dag_run(store) for _ in range(4)], []

    def one(parent):
        found.append(run(store, parent=parent))

    threads = [threading.Thread(target=one, args=(parent,)) for parent in parents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(hit(one) and one[0] == {"total": 10} for one in found)


MODEL = """import mlflow
import scrapbook as sb
from mlflow import MlflowClient
from mlpkg.models.registry import champion
from mlpkg.steps.tracking import connect
connect()
serving = champion("parcels")
sb.glue("version", serving.version if serving else 0)"""


def test_the_version_that_an_alias_stands_for_counts(store):
    step = store.notebook("30_model", "n: int = 1", MODEL)
    assert run(store, step)[0] == {"version": 0}
    second = run(store, step)
    assert hit(second), {n: v for n, v in second[1].data.tags.items() if "cache" in n}
    client = store.mlflow
    client.create_registered_model("parcels")
    made = client.create_model_version("parcels", "file:///parcels", run_id=None)
    other = run(store, step)
    assert hit(other), "a version that is not the champion changes nothing"
    client.set_registered_model_alias("parcels", "champion", made.version)
    found = run(store, step)
    assert found[0] == {"version": 1}
    assert "model 'parcels' champion was version none, is version 1" in said(store, found)


def test_mapped_steps_and_the_one_after_them_in_a_dag(store):
    write_notebook(
        store.root / "notebooks" / "30_total.ipynb", "counts: list = []",
        "import scrapbook as sb\nsb.glue('total', sum(c['rows'] for c in counts))",
    )  # fmt: skip
    file = store.root / "dags" / "mapped.py"
    file.write_text(file.read_text().replace("doc_md=__doc__", "doc_md=__doc__, default_args={'cache': True}"))
    outputs = [store.mlpkg("run", "mapped") for _ in range(2)]
    second, first = store.pipeline_runs("mapped")
    steps = store.steps(second)
    earlier = {name: step.info.run_id for name, step in store.steps(first).items()}
    assert {name: step.data.tags["mlpkg.cached_from"] for name, step in steps.items()} == earlier
    assert steps["total"].data.metrics["total"] == 3
    assert "unchanged, not run" in outputs[1] and f"mlflow://{earlier['total']}/notebook/total.ipynb" in outputs[1]
    assert "total = 3" in store.look("notebook", second.info.run_id, "total")
    assert "stands in" in store.look("why", second.info.run_id, "total")
    assert second.info.run_id[:8] in store.look("runs")
    assert not Path(store.settings.steps.outbox, earlier["total"]).exists()


def test_code_that_is_installed_anew_under_the_same_version_counts(project, tmp_path, monkeypatch):
    "As in an image that was built again"
    site, about = tmp_path / "site-packages", tmp_path / "site-packages" / "fares-0.1.0.dist-info"
    about.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))

    def install(fare: int) -> None:
        (site / "fares.py").write_text(f"fare = {fare}\n")
        (about / "RECORD").write_text(f"fares.py,sha256={fare},9\n")

    notebook = project.notebook(
        "10_sum", "rows: int = 3", "import scrapbook as sb\nfrom fares import fare\nsb.glue('total', rows * fare)"
    )
    results = []
    for fare in (1, 1, 7):
        install(fare)
        done = run_step(notebook, {}, settings=project.settings, caching=Caching(True))
        results.append((done.scraps["total"], "mlpkg.cached_from" in project.mlflow.get_run(done.run_id).data.tags))
    assert results == [(3, False), (3, True), (21, False)]


def test_what_cannot_be_asked_again_makes_a_step_run(store):
    store.mlflow.create_registered_model("parcels")
    store.mlflow.create_model_version("parcels", "file:///parcels", run_id=None)
    lake, root = store.settings.lake.root, store.root
    client = "import mlflow\nfrom mlpkg.steps.tracking import connect\nconnect()\n"
    asks = {
        f"import os\nos.listdir('{root}')": f"it asked which files are in {root}",
        f"from pathlib import Path\nlist(Path('{root}').glob('*.csv'))": f"it asked which files are in {root}",
        f"open('{lake}/raw/parcels/_delta_log/00000000000000000000.json').read()": "it asked a store for its file",
        "from mlpkg.data.lake import open_lake\nopen_lake().tables()": "it asked the lake which tables there are",
        f"{client}mlflow.search_runs(search_all_experiments=True)": "it asked MLflow by search_runs",
        f"{client}mlflow.search_logged_models(['0'])": "it asked MLflow by search_logged_models",
        f"{client}mlflow.MlflowClient().get_model_version('parcels', 1)": "it asked MLflow by get_model_version",
        "import subprocess\nsubprocess.run(['true'])": "it started another process (true)",
        f"{client}try:\n    mlflow.get_run('0' * 32)\nexcept Exception:\n    pass": "it asked MLflow by get_run",
        "import joblib\njoblib.Parallel(2)(joblib.delayed(abs)(i) for i in [1])": "it started another process (",
        "import joblib\n" * 2 + "joblib.Parallel(2)(joblib.delayed(abs)(i) for i in [1])": "another process (",
        "from mlpkg.data.sources import read_frame\ntry:\n    read_frame('http://127.0.0.1:9/a.csv')\n"
        "except Exception:\n    pass": "it asked what is at http://127.0.0.1:9/a.csv",
        "import os\nos.fork() or os._exit(0)\nos.wait()": "it started another process (os.fork)",
    }
    step = store.notebook("40_ask", "n: int = 1", "n")
    for code, what in asks.items():
        step = store.notebook("40_ask", "n: int = 1", code)
        assert what in run(store, step)[1].data.tags.get("mlpkg.cache.refused", "it would be reused"), code
    found = run(store, step)
    assert not hit(found) and what in said(store, found)
    assert "mlpkg.cache.refused" not in run(store, step, elsewhere=True)[1].data.tags
    assert hit(run(store, step, elsewhere=True))


def test_a_module_that_was_not_found_counts(store):
    code = "import scrapbook as sb\ntry:\n    from local_overrides import rate\nexcept ImportError:\n    rate = 1\n"
    step = store.notebook("30_rate", "n: int = 1", f"{code}sb.glue('rate', rate)")
    assert run(store, step)[0] == {"rate": 1}
    second = run(store, step)
    assert hit(second), {n: v for n, v in second[1].data.tags.items() if "cache" in n}
    (store.root / "notebooks" / "local_overrides.py").write_text("rate = 7")
    found = run(store, step)
    assert not hit(found) and found[0] == {"rate": 7}


def test_a_temporary_file_that_somebody_else_wrote_counts(store, tmp_path):
    (tmp_path / "rates.txt").write_text("1")
    code = f"import scrapbook as sb\nsb.glue('rate', open('{tmp_path}/rates.txt').read())"
    step = store.notebook("30_rate", "n: int = 1", code)
    run(store, step)
    second = run(store, step)
    assert hit(second), {n: v for n, v in second[1].data.tags.items() if "cache" in n}
    (tmp_path / "rates.txt").write_text("7")
    assert run(store, step)[0] == {"rate": "7"}


@pytest.mark.parametrize("reader", ["pandas.read_csv", "sources.read_frame", "platforms.read"])
def test_a_file_outside_the_project_counts_whoever_opens_it(store, tmp_path, reader):
    "A module of one's own may have a name that begins like that of a library"
    module = store.root / "notebooks" / "platforms.py"
    module.write_text("def read(path): return {'rate': [open(path).readlines()[1]]}")
    (tmp_path / "rates.csv").write_text("rate\n1\n")
    code = f"""import pandas, platforms
import scrapbook as sb
from mlpkg.data import sources
sb.glue("rate", int({reader}("{tmp_path}/rates.csv")["rate"][0]))"""
    step = store.notebook("30_rate", "n: int = 1", code)
    run(store, step)
    assert hit(run(store, step))
    (tmp_path / "rates.csv").write_text("rate\n7\n")
    assert run(store, step)[0] == {"rate": 7}


def test_what_was_asked_for_in_vain_counts(store):
    "A table, a column and an alias that are not there; the step goes on without them"
    code = """import mlflow
import scrapbook as sb
from mlpkg.data.lake import open_lake
from mlpkg.errors import MlpkgError
from mlpkg.steps.tracking import connect
connect()
lake, found = open_lake(), []
for name, columns in (("raw/trucks", None), ("raw/parcels", ["weight"])):
    try:
        found.append(len(lake.read(name, columns=columns)))
    except MlpkgError:
        found.append(0)
try:
    found.append(int(mlflow.MlflowClient().get_model_version_by_alias("parcels", "champion").version))
except mlflow.MlflowException:
    found.append(0)
sb.glue("found", found)"""
    step = store.notebook("30_vain", "n: int = 1", code)
    assert run(store, step)[0] == {"found": [0, 0, 0]}
    assert hit(run(store, step))
    store.lake.write("raw/trucks", pd.DataFrame({"truck": range(3)}))
    assert run(store, step)[0] == {"found": [3, 0, 0]}
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": [1], "weight": [2]}), "overwrite", change_schema=True)
    assert run(store, step)[0] == {"found": [3, 1, 0]}
    assert hit(run(store, step))
    store.mlflow.create_registered_model("parcels")
    version = store.mlflow.create_model_version("parcels", "file:///parcels", run_id=None).version
    store.mlflow.set_registered_model_alias("parcels", "champion", version)
    assert run(store, step)[0] == {"found": [3, 1, 1]}


CLIENT = "import mlflow, os\nfrom mlpkg.steps.tracking import connect\nconnect()\nclient = mlflow.MlflowClient()\n"


def test_a_step_that_changes_mlflow_outside_of_its_run_is_not_reused_unless_it_says_so(store):
    store.mlflow.create_registered_model("parcels")
    store.mlflow.create_model_version("parcels", "file:///parcels", run_id=None)
    up, named = "os.environ['MLPKG_PIPELINE_RUN']", "it changed model 'parcels' by "
    changes = {
        f"client.set_tag({up}, 'checked', 'yes')": " by set_tag in MLflow, outside of its own run",
        f"client.log_text({up}, 'all is well', 'checked.txt')": " by log_artifact in MLflow, outside",
        "client.set_registered_model_alias('parcels', 'champion', '1')": f"{named}set_registered_model_alias in MLflow",
        "client.set_model_version_tag('parcels', '1', 'checked', 'yes')": f"{named}set_model_version_tag in MLflow",
        "client.create_experiment('trials')": "it changed 'trials' by create_experiment in MLflow, outside",
        "client.create_logged_model('0', name='model')": " by create_logged_model in MLflow, outside of its own run",
        "client.create_registered_model('letters')": "it changed 'letters' by create_registered_model in MLflow",
        "client.copy_model_version('models:/parcels/1', 'copies')": "'copies' by copy_model_version in MLflow",
        "client.create_dataset('truth')": "it changed 'truth' by create_dataset in MLflow",
        "client.delete_traces('0', max_timestamp_millis=1)": "it changed '0' by delete_traces in MLflow",
        "client.create_mcp_server('com.example/tools')": " by create_mcp_server in MLflow, outside of its own run",
        "client.create_run('0')": " by create_run in MLflow, outside of its own run (cache_elsewhere=True allows that)",
    }
    for code, what in changes.items():
        step = store.notebook("40_change", "n: int = 1", CLIENT + code)
        assert what in run(store, step)[1].data.tags.get("mlpkg.cache.refused", "it would be reused"), code
    found = run(store, step)
    assert not hit(found) and what in said(store, found)
    assert not hit(run(store, step, elsewhere=True)), "what has run so far was not allowed to"
    assert hit(run(store, step, elsewhere=True))


def test_what_belongs_to_a_step_s_own_run_does_not_keep_it_from_being_reused(store):
    code = """from sklearn.dummy import DummyRegressor
with mlflow.start_run():
    mlflow.log_metric("size", 1)
    mlflow.log_text("all is well", "checked.txt")
    with mlflow.start_run(nested=True) as trial:
        mlflow.log_param("depth", 2)
    client.set_tag(trial.info.run_id, "best", "yes")
    fitted = DummyRegressor(strategy="constant", constant=1.0).fit([[0]], [0])
    made = mlflow.sklearn.log_model(fitted, name="model", pip_requirements=[], serialization_format="skops")
version = mlflow.register_model(made.model_uri, "parcels")
client.set_model_version_tag("parcels", version.version, "checked", "yes")"""
    step = store.notebook("40_log", "n: int = 1", CLIENT + code)
    assert run(store, step)[1].data.tags.get("mlpkg.cache.refused", "") == ""
    assert hit(run(store, step))


def test_a_model_counts_that_a_function_of_mlpkg_models_reads(store, tmp_path):
    "By number, by an alias, and the newest, which cannot be asked for again"
    import mlflow
    from sklearn.pipeline import make_pipeline
    from sklearn.tree import DecisionTreeRegressor

    from mlpkg.models.storage import log_model
    from mlpkg.steps.tracking import connect

    def register(value: float) -> None:
        fitted = make_pipeline(DecisionTreeRegressor()).fit(rows, [value] * 2)
        source = log_model(fitted, rows)
        store.mlflow.create_model_version("parcels", source, run_id=None, model_id=source.removeprefix("models:/"))

    connect(store.settings)
    rows = pd.DataFrame({"weight": [1.0, 2.0]})
    store.mlflow.create_registered_model("parcels")
    register(1.0)
    store.mlflow.set_registered_model_alias("parcels", "champion", "1")
    code = """import pandas as pd
import scrapbook as sb
from mlpkg.models.registry import load_logged
model = load_logged("models:/parcels{which}")
sb.glue("said", float(model.pipeline.predict(pd.DataFrame({{"weight": [1.0]}}))[0]))"""
    steps = {
        which: store.notebook(f"30_{name}", "n: int = 1", CLIENT + code.format(which=which))
        for which, name in (("/1", "number"), ("@champion", "alias"), ("/latest", "newest"))
    }
    for which, step in steps.items():
        first = run(store, step)
        assert first[0] == {"said": 1.0}
        assert hit(run(store, step)) == (which != "/latest"), first[1].data.tags.get("mlpkg.cache.refused")
    mlflow.end_run()
    register(7.0)
    store.mlflow.set_registered_model_alias("parcels", "champion", "2")
    assert hit(run(store, steps["/1"]))
    assert run(store, steps["@champion"])[0] == run(store, steps["/latest"])[0] == {"said": 7.0}
    store.mlflow.delete_model_version("parcels", "1")
    with pytest.raises(StepError):
        run(store, steps["/1"])
    mlflow.end_run()


VAIN = """import scrapbook as sb
from mlpkg.models.registry import RegistryError, get_version, versions
from mlpkg.steps.tracking import connect
connect()
try:
    found = get_version("parcels").version
except RegistryError:
    found = 0
sb.glue("found", [found, [one.aliases for one in versions("parcels")]])"""


def test_a_champion_that_was_not_there_and_one_that_moves_count(store):
    step = store.notebook("30_vain", "n: int = 1", VAIN)
    assert run(store, step)[0] == {"found": [0, []]}
    assert hit(run(store, step))
    store.mlflow.create_registered_model("parcels")
    for _ in range(2):
        store.mlflow.create_model_version("parcels", "file:///parcels", run_id=None)
    for number in (1, 2):
        store.mlflow.set_registered_model_alias("parcels", "champion", number)
        found = run(store, step)
        assert not hit(found) and found[0]["found"][0] == number
        assert hit(run(store, step))


def test_what_was_allowed_to_be_written_elsewhere_is_not_reused_once_it_is_not(store, tmp_path):
    target = tmp_path / "reports" / "report.txt"
    target.parent.mkdir()
    step = store.notebook("30_report", f"target: str = '{store.root}/report.txt'", WRITE)
    run(store, step, elsewhere=True)
    (store.root / "report.txt").unlink()
    assert not hit(run(store, step)) and (store.root / "report.txt").is_file()


def test_a_model_that_mlflow_reads_from_a_folder_counts(store, tmp_path):
    import mlflow
    from sklearn.dummy import DummyRegressor

    def save(value: float) -> None:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        fitted = DummyRegressor(strategy="constant", constant=value).fit([[0]], [0])
        mlflow.sklearn.save_model(fitted, str(tmp_path / "model"), pip_requirements=[], serialization_format="skops")

    save(1.0)
    code = f"""import mlflow
import scrapbook as sb
sb.glue("said", float(mlflow.sklearn.load_model("{tmp_path}/model").predict([[0]])[0]))"""
    step = store.notebook("30_said", "n: int = 1", code)
    run(store, step)
    save(7.0)
    assert run(store, step)[0] == {"said": 7.0}


def test_a_kernel_with_packages_of_its_own_is_not_compared():
    from mlpkg.steps.record import refusal

    seen = {"changed": [], "asked": [], "started": [], "writes": [], "prefix": "/opt/other"}
    assert refusal(Caching(True), seen) == "its kernel has packages of its own (/opt/other), which are not compared"


def test_a_file_that_is_copied_over_with_its_time_was_changed(store):
    (store.root / "rates.txt").write_text("1")
    (store.root / "other.txt").write_text("7")
    code = (
        f"import shutil\nimport scrapbook as sb\nrate = open('{store.root}/rates.txt').read()\n"
        f"shutil.copy2('{store.root}/other.txt', '{store.root}/rates.txt')\nsb.glue('rate', rate)"
    )
    step = store.notebook("30_rate", "n: int = 1", code)
    found = run(store, step, elsewhere=True)
    assert found[1].data.tags["mlpkg.cache.refused"] == f"{store.root}/rates.txt was changed while the step ran"


PLAIN = """import tempfile
from pathlib import Path
import matplotlib.pyplot as plt
import mlflow
import pandas as pd
import scrapbook as sb
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from mlpkg.data.lake import open_lake
from mlpkg.steps.tracking import connect
connect()
lake = open_lake()
rows = lake.read("raw/parcels")
x, y = rows[["parcel"]], rows["parcel"] > 2
RandomForestRegressor(n_estimators=3, n_jobs=2, random_state=0).fit(x, y)
model = LogisticRegression().fit(x, y)
rows.plot()
plt.show()
with tempfile.TemporaryDirectory() as scratch:
    rows.to_csv(f"{scratch}/rows.csv")
    again = pd.read_csv(Path(scratch, "rows.csv"))
with mlflow.start_run():
    mlflow.log_metric("rows", len(again))
    mlflow.log_param("kind", "plain")
    mlflow.log_figure(plt.figure(), "plot.png")
    mlflow.sklearn.log_model(model, name="model", serialization_format="cloudpickle")
lake.write("plain/parcels", again, mode="overwrite")
sb.glue("rows", len(again))"""


def test_a_plain_step_with_the_usual_libraries_is_reused(store):
    step = store.notebook("50_plain", "n: int = 1", PLAIN)
    first = run(store, step)
    assert "mlpkg.cache.refused" not in first[1].data.tags, first[1].data.tags["mlpkg.cache.refused"]
    found = run(store, step)
    assert hit(found), said(store, found)
