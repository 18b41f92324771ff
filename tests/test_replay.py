"""Runs executed once more from their record: real projects in git, and commands in processes of their own."""

import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from conftest import commit, git

from mlpkg.data.lake import Lake
from mlpkg.steps.provenance import installed
from mlpkg.steps.record import Caching, read_record
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import end_run, open_pipeline_run, step_runs

COUNT = """import scrapbook as sb
import helper
from mlpkg.data.lake import open_lake
lake = open_lake()
rows = lake.read("raw/parcels")
lake.write("sum/parcels", rows * factor * helper.unit, mode="overwrite")
sb.glue("total", float(rows["parcel"].sum()) * factor * helper.unit)"""
DIE = "import random\nimport scrapbook as sb\nsb.glue('thrown', random.randint(1, 1000000))"


@pytest.fixture
def parcels(project):
    "A project in git with a table, and a run of two steps: one counts, the other throws a die without a seed"
    (project.root / ".gitignore").write_text("var\n")
    (project.root / "notebooks" / "helper.py").write_text("unit = 0.1\n")
    (project.root / "requirements.lock").write_text("pandas==" + pd.__version__ + "\n")
    project.count = project.notebook("10_count", "factor: float = 1.0", COUNT)
    project.die = project.notebook("20_die", "sides: int = 6", DIE)
    git(project, "init", "-q")
    project.commit = commit(project, "first")
    project.lake = Lake(project.settings.lake.root)
    project.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    return project


def run(project, *notebooks, cache: bool = False, **parameters) -> str:
    "Run notebooks as the steps of a DAG run, and return its id in MLflow"
    parent = open_pipeline_run(
        project.mlflow, project.settings, "parcels", f"manual__{len(project.pipeline_runs('parcels'))}"
    )
    for notebook in notebooks:
        run_step(notebook, parameters, parent=parent, settings=project.settings, caching=Caching(cache))
    end_run(project.mlflow, parent, "FINISHED")
    return parent


def state(project) -> tuple:
    "What a replay must leave alone"
    runs = project.mlflow.search_runs([one.experiment_id for one in project.mlflow.search_experiments()])
    tables = {name: project.lake.version(name) for name in project.lake.tables()}
    files = sorted(
        str(path) for path in (project.root / "var").rglob("*") if path.is_file() and ".lock" not in path.name
    )
    return len(runs), tables, [file for file in files if "downloads" not in file], git(project, "worktree", "list")


def replayed(project, *args: str, code: int = 0) -> str:
    "The report of a replay, which has changed nothing"
    before = state(project)
    output = " ".join(project.mlpkg("replay", *args, code=code, timeout=900).replace("│", " ").split())
    assert state(project) == before
    return output


def test_a_run_with_the_code_the_tables_and_the_parameters_of_then(parcels):
    parent = run(parcels, parcels.count, factor=3.0)
    parcels.lake.write("raw/parcels", pd.DataFrame({"parcel": range(9)}))  # everything is another one now
    (parcels.root / "notebooks" / "helper.py").write_text("unit = 0.2\n")
    parcels.notebook("10_count", "factor: float = 2.0", COUNT.replace("sum()", "max()"))
    commit(parcels, "second")
    output = replayed(parcels, parent[:8])
    assert "count the same (2 values and tables compared)" in output and "1 of 1 steps agree to the digit" in output
    assert "table sum/parcels: the same 5 rows" in output

    without = replayed(parcels, parent[:8], "cuont", code=2)
    assert "no run of step 'cuont' (there are: 'count')" in without


def test_a_notebook_without_a_seed_is_reported(parcels):
    parent = run(parcels, parcels.die)
    output = replayed(parcels, parent[:8], code=1)
    assert re.search(r"die 1 of 1 differ what name recorded now scrap thrown \d+ \d+", output)
    assert "what differs is random, or comes from outside" in output and "0 of 1 steps agree" in output


def test_a_commit_that_is_gone(parcels):
    parent = run(parcels, parcels.count)
    shutil.rmtree(parcels.root / ".git")
    git(parcels, "init", "-q")
    commit(parcels, "anew")
    output = replayed(parcels, parent[:8])
    assert f"Code: commit {parcels.commit[:12]} is not in the repository" in output
    assert "any more: the files of today are used in its place" in output


def test_a_tree_that_was_dirty_and_a_notebook_that_nobody_committed(parcels):
    notebook = parcels.notebook("10_count", "factor: float = 1.0", COUNT.replace("* factor", "* factor * 7"))
    parent = run(parcels, notebook)
    parcels.notebook("10_count", "factor: float = 1.0", COUNT)
    output = replayed(parcels, parent[:8])
    assert f"there were changes that nobody had committed: the files of commit {parcels.commit[:12]} are used" in output
    assert "notebook 10_count.ipynb is another one in these files: the one that MLflow has stored is used" in output

    (parcels.root / "notebooks" / "helper.py").write_text("unit = 0.3\n")  # this, no record can tell
    parent = run(parcels, parcels.count)
    (parcels.root / "notebooks" / "helper.py").write_text("unit = 0.1\n")
    output = replayed(parcels, parent[:8], code=1)
    assert "there were changes that nobody had committed" in output and "scrap total 3.0 1.0" in output
    assert "table sum/parcels: differs, in the columns parcel" in output


def test_a_table_version_that_is_gone(parcels):
    parent = run(parcels, parcels.count)
    parcels.lake.write("raw/parcels", pd.DataFrame({"parcel": range(9)}), mode="overwrite")
    parquet = (parcels.root / "var" / "lake" / "raw" / "parcels").glob("*.parquet")
    min(parquet, key=lambda file: file.stat().st_mtime).unlink()  # as `mlpkg tidy` does after some months
    output = replayed(parcels, parent[:8], code=1)
    assert "count not replayed: tables that it worked on do not exist any more: raw/parcels version 0" in output


def test_a_step_that_failed(parcels):
    program = "import os\nsold = 0\nprice = 100 / sold"
    notebook = parcels.notebook("30_price", "factor: float = 1.0", program)
    commit(parcels, "prices")
    parent = open_pipeline_run(parcels.mlflow, parcels.settings, "parcels", "manual__1")
    for text in (program, program.replace("sold = 0", "sold = 1 - os.path.exists('hurdle')")):
        parcels.notebook("30_price", "factor: float = 1.0", text)
        (notebook.parent / "hurdle").touch()
        with pytest.raises(Exception, match="division by zero"):
            run_step(notebook, parent=parent, settings=parcels.settings)
        (notebook.parent / "hurdle").unlink()
        if text == program:
            assert "note: it fails as it did then: cell 2" in replayed(parcels, parent[:8], "price")
    output = replayed(parcels, parent[:8], "price", code=1)
    assert "outcome failure ZeroDivisionError: division by zero it runs to its end" in output


REPORT = """import os
import mlflow
client = mlflow.MlflowClient()
whole = os.environ["MLPKG_PIPELINE_RUN"]
client.log_text(whole, os.environ.get("WORDS", "none"), "report.txt")
client.log_text(os.environ["MLFLOW_RUN_ID"], "x", "own.txt")"""
REMOVE = """import os
from pathlib import Path
import mlflow
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
import scrapbook as sb
from mlpkg.settings import load_settings
found = mlflow.MlflowClient().get_run(os.environ["MLPKG_PIPELINE_RUN"]).info.artifact_uri
before = [file.path for file in get_artifact_repository(found).list_artifacts() if file.path == "kept.txt"]
get_artifact_repository(found).delete_artifacts()
sb.glue("seen", before)"""


def test_artifacts_that_are_there_stay_as_they_are(parcels, monkeypatch):
    report, remove = (
        parcels.notebook(name, "a: int = 1", text) for name, text in (("30_report", REPORT), ("40_remove", REMOVE))
    )
    commit(parcels, "reports")
    parent = run(parcels, report)
    parcels.mlflow.log_text(parent, "what people have read", "report.txt")
    monkeypatch.setenv("WORDS", "written by a replay")
    assert "1 of 1 steps agree to the digit" in replayed(parcels, parent[:8], "report")
    artifacts = Path(parcels.mlflow.get_run(parent).info.artifact_uri)
    assert (artifacts / "report.txt").read_text() == "what people have read"

    again = open_pipeline_run(parcels.mlflow, parcels.settings, "parcels", "manual__9")
    parcels.mlflow.log_text(again, "kept", "kept.txt")
    run_step(remove, parent=again, settings=parcels.settings)
    parcels.mlflow.log_text(again, "kept", "kept.txt")
    end_run(parcels.mlflow, again, "FINISHED")
    assert "1 of 1 steps agree to the digit; artifacts are not compared" in replayed(parcels, again[:8])
    assert (Path(parcels.mlflow.get_run(again).info.artifact_uri) / "kept.txt").read_text() == "kept"


def test_artifacts_in_a_bucket_are_not_touched(parcels):
    parent = run(parcels, parcels.count)
    with contextlib.closing(sqlite3.connect(parcels.settings.tracking.uri.removeprefix("sqlite:///"))) as store:
        store.execute("UPDATE runs SET artifact_uri = 's3://bucket/' || run_uuid WHERE run_uuid = ?", [parent])
        store.commit()
    output = replayed(parcels, parent[:8], code=1)
    assert f"count not replayed: MLflow keeps artifacts at s3://bucket/{parent}, which is not a local folder" in output
    other = run(parcels, parcels.count)
    assert "1 of 1 steps agree to the digit" in replayed(parcels, other[:8]), "that bucket is not its business"


LOOK = """import mlflow
import scrapbook as sb
from mlpkg.steps.tracking import connect
connect()
store = mlflow.MlflowClient()
sb.glue("own", len(mlflow.artifacts.load_text(f"{store.get_run(whole).info.artifact_uri}/own.txt")))
sb.glue("other", len(mlflow.artifacts.load_text(f"{store.get_run(other).info.artifact_uri}/own.txt")))"""


def test_artifacts_of_other_dag_runs_are_not_copied(parcels):
    other, whole = (
        open_pipeline_run(parcels.mlflow, parcels.settings, "parcels", f"manual__{name}") for name in ("a", "b")
    )
    for one in (other, whole):
        parcels.mlflow.log_text(one, "text", "own.txt")
    step = parcels.notebook("70_look", "whole: str = ''\nother: str = ''", LOOK)
    commit(parcels, "look")
    run_step(step, {"whole": whole, "other": other}, parent=whole, settings=parcels.settings)
    end_run(parcels.mlflow, whole, "FINISHED")
    output = replayed(parcels, whole[:8], code=1)
    assert f"not-copied/{other}" in output and f"not-copied/{whole}" not in output


def test_a_logged_model_that_was_deleted(parcels):
    "It is no obstacle: the step is executed, and what is compared is told"
    code = """import mlflow
import scrapbook as sb
from mlpkg.steps.tracking import connect
connect()
mlflow.start_run(run_id=__import__("os").environ["MLFLOW_RUN_ID"])
made = mlflow.initialize_logged_model(name="forest")
mlflow.finalize_logged_model(made.model_id, "READY")
mlflow.log_outputs([mlflow.entities.LoggedModelOutput(made.model_id, 0)])
sb.glue("one", 1)"""
    step = parcels.notebook("80_model", "a: int = 1", code)
    commit(parcels, "model")
    parent = run(parcels, step)
    (made,) = step_runs(parcels.mlflow, parent)[0].outputs.model_outputs
    parcels.mlflow.delete_logged_model(made.model_id)
    assert "1 of 1 steps agree to the digit" in replayed(parcels, parent[:8])


LOGS = """import scrapbook as sb
from pathlib import Path
from mlpkg.settings import load_settings
logs = Path(load_settings().airflow.logs or "none")
(logs / "log.txt").unlink(missing_ok=True)
sb.glue("dags", Path(load_settings().airflow.dags).name)"""


def test_logs_and_dags_that_are_there_stay_as_they_are(parcels, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").write_text("of Airflow")
    text = parcels.root / "settings.ini"
    text.write_text(text.read_text().replace("airflow.logs = ", f"airflow.logs = {tmp_path}/logs"))
    notebook = parcels.notebook("50_logs", "a: int = 1", LOGS)
    commit(parcels, "logs")
    parent = run(parcels, notebook)
    (tmp_path / "logs" / "log.txt").write_text("of Airflow")
    assert "1 of 1 steps agree to the digit" in replayed(parcels, parent[:8])
    assert (tmp_path / "logs" / "log.txt").read_text() == "of Airflow"


SECRETS = """import secrets
import scrapbook as sb
import os
from mlpkg.data.lake import open_lake
sb.glue("token", secrets.token_hex(16))
sb.glue("run", os.environ["MLFLOW_RUN_ID"])
import pandas as pd
once = os.environ.get("MLPKG_SETTINGS", "").find("mlpkg-replay") < 0
open_lake().write("then/only" if once else "now/only", pd.DataFrame({"a": [1]}))"""


def test_ids_of_others_and_other_tables_are_differences(parcels):
    parent = run(parcels, parcels.notebook("60_secrets", "a: int = 1", SECRETS))
    output = replayed(parcels, parent[:8], code=1)
    assert re.search(r"scrap token [0-9a-f]{32} [0-9a-f]{32}", output) and "scrap run" not in output
    assert re.search(r"table then/only 1 rows, [0-9a-f]{12} not written", output)
    assert re.search(r"table now/only not written 1 rows, [0-9a-f]{12}", output)


def test_a_step_for_which_an_earlier_run_stood_in(parcels):
    first, second = (run(parcels, parcels.count, cache=True) for _ in range(2))
    (step,) = step_runs(parcels.mlflow, second)
    earlier = step.data.tags["mlpkg.cached_from"]
    assert step_runs(parcels.mlflow, first)[0].info.run_id == earlier
    output = replayed(parcels, second[:8])
    assert "count the same (2 values and tables compared)" in output and "1 of 1 steps agree" in output
    assert f"note: it was not run, as run {earlier} stood in for it: that one is replayed" in output


def test_steps_of_two_commits_have_each_their_own_code(parcels):
    "As after `mlpkg run --resume` with mended code"
    parent = run(parcels, parcels.count)
    # Of another length: Python takes a module for unchanged if time, in seconds, and size are the same.
    (parcels.root / "notebooks" / "helper.py").write_text("unit = 7.00\n")
    again = parcels.notebook("30_again", "factor: float = 1.0", COUNT)
    mended = commit(parcels, "mended")
    run_step(again, {}, parent=parent, settings=parcels.settings)
    output = replayed(parcels, parent[:8])
    assert "2 of 2 steps agree to the digit" in output
    assert f"Code: that of count is of commit {parcels.commit[:12]}" in output
    assert f"Code: that of again is of commit {mended[:12]}" in output
    assert f"of commit {parcels.commit[:12]}" not in replayed(parcels, parent[:8], "again")


def test_a_library_that_is_another_one(parcels):
    (parcels.root / "requirements.lock").write_text("pandas==1.0.0 \\\n    --hash=sha256:00\n")
    commit(parcels, "an old lock")
    parent = run(parcels, parcels.die)
    output = replayed(parcels, parent[:8], code=1)
    headings = "library requirements.lock of then installed then installed now"
    here = pd.__version__
    assert f"Libraries that are not what they were: {headings} pandas 1.0.0 {here} {here}" in output

    (step,) = step_runs(parcels.mlflow, parent)
    record = read_record(step)
    record["about"]["packages"]["numpy"] = "1.0.0"
    parcels.mlflow.log_text(step.info.run_id, json.dumps(record), "cache/record.json")
    output = replayed(parcels, parent[:8], code=1)
    assert f"numpy - 1.0.0 {installed_version('numpy')}" in output
    assert f"pandas 1.0.0 {pd.__version__} {pd.__version__}" in output


def installed_version(name: str) -> str:
    return next(line for line in installed() if line.startswith(f"{name}==")).partition("==")[2]


def test_a_run_of_the_command_line_with_mapped_steps(project):
    (project.root / ".gitignore").write_text("var\n")
    program = "import scrapbook as sb\nsb.glue('total', sum(c['rows'] for c in counts))"
    project.notebook("30_total", "counts: list = []", program)
    git(project, "init", "-q")
    commit(project, "first")
    project.lake = Lake(project.settings.lake.root)
    project.mlpkg("run", "mapped")
    (found,) = project.pipeline_runs("mapped")
    assert "environment.txt" in [file.path for file in project.mlflow.list_artifacts(found.info.run_id)]
    output = replayed(project, found.info.run_id[:8])
    assert "3 of 3 steps agree to the digit" in output and "Libraries" not in output
    assert "count [2] the same" in replayed(project, found.info.run_id[:8], "count [2]")
