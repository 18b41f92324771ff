"""Whole DAG runs in one process, as `mlpkg run` does them. A page cannot show a separate process."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys


def test_notebooks_run_nested_and_are_stored(project):
    output = project.mlpkg("run", "small", "--param", "rows=7")
    (run,) = project.pipeline_runs("small")
    steps = project.steps(run)
    assert run.info.status == "FINISHED"
    assert run.data.params["rows"] == "7"
    assert list(steps) == ["count", "report"]
    for step in steps.values():
        assert step.info.status == "FINISHED"
        assert project.artifacts(step) == [f"{step.info.run_name}.html", f"{step.info.run_name}.ipynb"]
        assert step.data.tags["mlpkg.attempt"] == "1"
    assert steps["count"].data.metrics["rows"] == 7
    assert steps["count"].data.params == {"rows": "7"}
    assert steps["report"].data.params == {"factor": "2.0"}
    assert "small succeeded" in output and f"mlflow://{steps['count'].info.run_id}/notebook/count.ipynb" in output


def test_a_terminal_shows_a_live_table_and_nothing_from_airflows_log(project):
    slow = "import scrapbook as sb\nimport time\ntime.sleep(2)\nsb.glue('rows', rows)"  # long enough to be seen
    project.notebook("10_count", "rows: int = 3", slow)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "small"]
    process = subprocess.Popen(
        command, cwd=project.root, env=project.env | {"TERM": "xterm"}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # reading ends with an error when the other side is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"cell \d of \d", text) and re.search(r"count +finished", text)
    assert "[info" not in text and "DAG TEST" not in text


def test_a_failing_notebook_fails_the_run_and_is_stored(project):
    project.notebook("10_count", "rows: int = 3", "sold = rows - 3\nprice = 100 / sold", "print('never')")
    output = project.mlpkg("run", "small", code=1)
    (run,) = project.pipeline_runs("small")
    (step,) = project.steps(run).values()
    assert (run.info.status, step.info.status) == ("FAILED", "FAILED")
    assert step.data.tags["mlpkg.failure.cell"] == "cell 2 (`price = 100 / sold`)"
    assert step.data.tags["mlpkg.failure.error"] == "ZeroDivisionError: division by zero"
    assert "price = 100 / sold" in step.data.tags["mlpkg.failure.traceback"]
    assert project.artifacts(step) == ["count.html", "count.ipynb"]
    assert "small failed" in output and "cell 2 (`price = 100 / sold`): ZeroDivisionError: division by zero" in output


def test_mapped_notebooks_pass_on_their_results(project):
    project.notebook(
        "30_total", "counts: list = []", "import scrapbook as sb\nsb.glue('total', sum(c['rows'] for c in counts))"
    )
    project.mlpkg("run", "mapped")
    (run,) = project.pipeline_runs("mapped")
    steps = project.steps(run)
    assert sorted(steps) == ["count [1]", "count [2]", "total"]
    assert steps["total"].data.metrics["total"] == 3


def test_the_stock_operator_stores_its_notebook_in_mlflow(project):
    project.mlpkg("run", "stock")
    (run,) = project.pipeline_runs("stock")
    assert run.info.status == "FINISHED"
    assert project.artifacts(run) == ["count.html", "count.ipynb"]


def test_papermill_in_a_shell_writes_to_mlflow(project):
    from mlpkg.steps.tracking import start_step

    notebook = project.notebook("10_count", "rows: int = 3", "print(rows)")
    run_id = start_step(project.mlflow, project.settings, "count")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        f"mlflow://{run_id}/notebook/count.ipynb",
        "-p",
        "rows",
        "9",
    ]
    subprocess.run(command, cwd=project.root, env=project.env, check=True, capture_output=True)
    assert project.stored(project.mlflow.get_run(run_id)).cells[-1].outputs[0].text == "9\n"


def test_two_runs_at_once_on_sqlite(project):
    command = (sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "small", "--param")
    first, second = project.start(*command, "rows=1"), project.start(*command, "rows=2")
    for process in (first, second):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    runs = project.pipeline_runs("small")
    assert sorted(run.data.params["rows"] for run in runs) == ["1", "2"]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert [s.data.metrics.get("rows") for s in project.steps(run).values()][0] == float(run.data.params["rows"])


def test_two_processes_make_airflows_database_once(project):
    (project.root / "var" / "airflow" / "mlpkg-migrated").unlink()
    make = (
        "from mlpkg.settings import load_settings; from mlpkg.airflow.home import prepare_database, use_airflow;"
        "s = load_settings(); use_airflow(s); made = prepare_database(s); print(made, flush=True)"
    )
    command = [sys.executable, "-c", make]
    both = [
        subprocess.Popen(command, cwd=project.root, env=project.env, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    said = sorted(process.communicate(timeout=300)[0].splitlines()[-1] for process in both)
    assert said == ["False", "True"]


def test_a_copied_project_has_a_database_of_its_own(project, stores):
    "Airflow writes the path of its database into `airflow.cfg`, which is copied with the project"
    before = (stores / "var" / "airflow" / "airflow.db").read_bytes()
    shutil.copy(stores / "var" / "airflow" / "airflow.cfg", project.root / "var" / "airflow")
    project.mlpkg("run", "small")
    config = (project.root / "var" / "airflow" / "airflow.cfg").read_text()
    assert str(stores) not in config and f"{project.root}/var/airflow/airflow.db" in config
    assert (stores / "var" / "airflow" / "airflow.db").read_bytes() == before


def test_a_copy_without_the_note_where_it_was_is_told_whose_files_it_would_use(project, tmp_path):
    "It was restored from a backup without that file, or made before there was one"
    project.mlpkg("run", "small")
    copied = type(project)(shutil.copytree(project.root, tmp_path / "copy"))
    (note,) = copied.root.rglob("mlflow.db.folder")
    was = note.read_text()
    note.unlink()
    for _ in range(2):  # until somebody has decided
        told = copied.mlpkg("runs")
        assert f"into {note}" in told.replace("\n", " ") and was.strip() in told and not note.exists()
    note.write_text(was)
    assert "paths in it follow" in copied.mlpkg("runs")


def test_a_copied_project_keeps_its_runs_to_itself(project, tmp_path):
    "MLflow writes absolute paths into its database"
    project.mlpkg("run", "small")
    before = sorted(path for path in (project.root / "var").rglob("*") if path.suffix == ".ipynb")
    copied = type(project)(shutil.copytree(project.root, tmp_path / "Büro 2"))
    output = copied.mlpkg("run", "small")
    assert "was copied or moved from" in output and output.count("paths in it follow") == 1
    shutil.rmtree(project.root)
    newest, oldest = copied.pipeline_runs("small")
    for run in (newest, oldest):
        for step in copied.steps(run).values():
            assert copied.stored(step).cells, "of runs before and after"
    assert len([path for path in (copied.root / "var").rglob("*.ipynb")]) == 2 * len(before)


def test_artifacts_of_a_copied_project_that_are_elsewhere_stay_there(project, tmp_path):
    "Whatever the folders are called: the project itself may have some with the same names"
    elsewhere = {"MLPKG_TRACKING__ARTIFACTS": f"{tmp_path}/disk/artifacts"}
    project.mlpkg("run", "small", **elsewhere)
    copied = type(project)(shutil.copytree(project.root, tmp_path / "copy"))
    (copied.root / "var" / "artifacts" / "small").mkdir(parents=True)
    copied.mlpkg("run", "small", **elsewhere)
    for run in copied.pipeline_runs("small"):
        for step in copied.steps(run).values():
            assert step.info.artifact_uri.startswith(f"{tmp_path}/disk/artifacts/")
            assert copied.stored(step).cells


def test_parameters_are_checked_before_anything_starts(project):
    assert "none of these DAGs has a parameter colour (they have: rows)" in project.mlpkg(
        "run", "small", "-p", "colour=1", code=2
    )
    assert "--param rows: expected name=value" in project.mlpkg("run", "small", "-p", "rows", code=2)
    said = project.mlpkg("run", "smal", code=2)
    assert "unknown DAG smal (there are: mapped, small, stock, watching); did you mean 'small'?" in said
    said = project.mlpkg("run", "smal", "stok", "kettle", code=2)
    assert "; smal: did you mean 'small'?; stok: did you mean 'stock'?" in said and "kettle:" not in said
    assert project.pipeline_runs("small") == []


def test_runs_of_a_dag_without_any_suggest_a_name_only_where_it_has_runs(project):
    from mlpkg.cli.runs import _no_runs

    store = project.mlflow
    store.create_run(store.create_experiment("small"), tags={"mlpkg.kind": "pipeline", "mlpkg.dag_id": "small"})
    for empty in ("smally", "stock"):
        store.create_experiment(empty)
    hints = {"smally": ": mlpkg run smally", "stok": ": mlpkg run stok", "smal": "; did you mean 'small'?"}
    assert {dag: _no_runs(store, dag).removeprefix(f"No runs of {dag} yet") for dag in hints} == hints


def test_a_parameter_that_a_notebook_refuses_fails_the_run(project):
    project.notebook("10_count", "rows: int = 3", "print(rows)")
    output = project.mlpkg("run", "small", "-p", "rows=many", code=1)
    assert "parameter 'rows' is declared int, got 'many'" in output
    (run,) = project.pipeline_runs("small")
    (step,) = project.steps(run).values()
    assert (run.info.status, step.info.status) == ("FAILED", "FAILED")
    assert project.artifacts(step) == ["count.html", "count.ipynb"]


INTERRUPTED = """
import mlpkg.airflow.dags as dags

def interrupt(*args):
    raise KeyboardInterrupt

dags.end_run = interrupt  # Ctrl-C while the teardown task runs
"""


def test_a_run_that_its_teardown_task_could_not_close(project):
    small = project.root / "dags" / "small.py"
    small.write_text(f"{small.read_text()}\n{INTERRUPTED}")
    project.mlpkg("run", "small", code=None)
    (run,) = project.pipeline_runs("small")
    assert run.info.status in ("FINISHED", "FAILED")
    assert [step.info.status for step in project.steps(run).values()] == ["FINISHED", "FINISHED"]


def test_runs_that_airflow_knows_to_be_over(project):
    project.mlpkg("run", "small")
    (run,) = project.pipeline_runs("small")
    project.mlflow.update_run(run.info.run_id, status="RUNNING")  # as if MLflow had been away when it was closed
    assert f"closed run {run.info.run_id}: its DAG run is over" in project.mlpkg("sync")
    assert project.mlflow.get_run(run.info.run_id).info.status == "FINISHED"

    project.mlflow.update_run(run.info.run_id, status="RUNNING")
    project.mlpkg("run", "small")
    assert [run.info.status for run in project.pipeline_runs("small")] == ["FINISHED", "FINISHED"]

    project.mlflow.update_run(run.info.run_id, status="RUNNING")
    project.mlpkg("run", "watching")  # the DAG that watches `small` would wait for this run for a week
    assert project.mlflow.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_dag_with_nothing_to_say_records_nothing(project):
    output = project.mlpkg("run", "watching")
    assert "watching succeeded" in output
    assert project.pipeline_runs("watching") == []
