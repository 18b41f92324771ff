"""A DAG run that failed goes on, by the command line and by Airflow's own clearing. A page cannot show processes."""

import json
import os
import signal
import socket
import sqlite3
import sys
import urllib.request

import pandas as pd
import pytest
from conftest import wait_for

from mlpkg.data.lake import Lake

DAG = """from airflow.sdk import DAG

from mlpkg.airflow.dags import notebook_steps, recorded_run

with DAG("parcels", schedule=None, params={"rows": 3, "names": ["a", "b"]}, default_args={"retries": 0}):
    with recorded_run():
        notebook_steps("notebooks", "10_count", "20_check", "30_report")
"""
COUNT = """import scrapbook as sb
from mlpkg.data.lake import open_lake
sb.glue("seen", len(open_lake().read("raw/parcels")) + 0 * rows)
open("counted", "a").write("x")"""
CHECK = """import os, time
import scrapbook as sb
from mlpkg.data.lake import open_lake
lake = open_lake()
sb.glue("seen", len(lake.read("raw/parcels")))
sb.glue("rows", rows)
sb.glue("names", names)
while os.path.exists("wait"): time.sleep(0.1)
if not os.path.exists("mended"): raise RuntimeError("not mended yet")"""


@pytest.fixture
def parcels(project):
    "A project with a table and a DAG of three steps, whose second one fails until there is a file `mended`"
    (project.root / "dags" / "parcels.py").write_text(DAG)
    project.notebook("10_count", "rows: int = 0", COUNT)
    project.notebook("20_check", "rows: int = 0\nnames: list = []", CHECK)
    project.notebook("30_report", "rows: int = 0", "import scrapbook as sb\nsb.glue('rows', rows)")
    project.lake = Lake(project.settings.lake.root)
    project.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    return project


def said(output: str) -> str:
    "What a command printed, without the frame that Typer draws"
    return " ".join(output.replace("│", " ").split())


def steps_of(project, run) -> list[tuple[str, str, str]]:
    "Name, status and attempt of the steps of a run, oldest first"
    from mlpkg.steps.tracking import step_runs

    found = step_runs(project.mlflow, run.info.run_id)
    return [(one.info.run_name, one.info.status, one.data.tags["mlpkg.attempt"]) for one in found]


went_on = [
    ("count", "FINISHED", "1"),
    ("check", "FAILED", "1"),
    ("check", "FINISHED", "2"),
    ("report", "FINISHED", "1"),
]


def test_a_run_goes_on_at_the_failed_step_with_its_tables_and_its_record(parcels):
    parcels.mlpkg("run", "parcels", "-p", "rows=7", code=1)
    (run,) = parcels.pipeline_runs("parcels")
    short, notebooks = run.info.run_id[:8], parcels.root / "notebooks"

    assert "--param rows=8 with --resume" in said(parcels.mlpkg("run", "parcels", "--resume", "-p", "rows=8", code=2))
    unknown = said(parcels.mlpkg("run", "parcels", "--resume", "yesterday", code=2))
    assert "--resume yesterday: no run begins with that, and Airflow has none of that name" in unknown
    assert f"(runs of parcels that did not finish: {short})" in unknown
    other = said(parcels.mlpkg("run", "small", "--resume", short, code=2))
    assert f"is a run of parcels: mlpkg run parcels --resume {short}" in other

    parcels.mlpkg("run", "parcels", "--resume", code=1)  # nothing is mended yet: it fails again, at the same step
    assert steps_of(parcels, run) == [("count", "FINISHED", "1"), ("check", "FAILED", "1"), ("check", "FAILED", "2")]
    assert parcels.pipeline_runs("parcels")[0].info.status == "FAILED"

    (notebooks / "mended").touch()
    dag = parcels.root / "dags" / "parcels.py"
    dag.write_text(DAG.replace('["a", "b"]', '["c"]'))  # a default that is another one now
    parcels.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))  # and newer data
    output = parcels.mlpkg("run", "parcels", "--resume", short)
    (run,) = parcels.pipeline_runs("parcels")
    assert f"run {short}" in output and run.info.status == "FINISHED" and "mlpkg.failed_steps" not in run.data.tags
    assert steps_of(parcels, run) == [*went_on[:2], ("check", "FAILED", "2"), ("check", "FINISHED", "3"), went_on[3]]
    assert (notebooks / "counted").read_text() == "x", "the finished step was not executed again"
    check = parcels.steps(run)["check"]
    assert (check.data.metrics["seen"], check.data.metrics["rows"], check.data.params["names"]) == (5, 7, "['a', 'b']")

    assert "nothing to resume: every run of parcels finished" in said(
        parcels.mlpkg("run", "parcels", "--resume", code=2)
    )
    assert f"nothing to resume: run {short} finished" in said(
        parcels.mlpkg("run", "parcels", "--resume", short, code=2)
    )


def test_a_long_default_is_not_cut_off(project):
    "MLflow keeps 6,000 characters of a parameter"
    program = "import os\nopen('lengths', 'a').write(f'{len(query)} ')\nassert os.path.exists('mended')"
    project.notebook("10_select", "query: str = ''", program)
    (project.root / "dags" / "selecting.py").write_text(
        "from airflow.sdk import DAG\n\nfrom mlpkg.airflow.dags import notebook_steps, recorded_run\n\n"
        "with DAG('selecting', schedule=None, params={'query': 'x' * 7000}, default_args={'retries': 0}):\n"
        "    with recorded_run():\n        notebook_steps('notebooks', '10_select')\n"
    )
    project.mlpkg("run", "selecting", code=1)
    (project.root / "notebooks" / "mended").touch()
    project.mlpkg("run", "selecting", "--resume")
    assert (project.root / "notebooks" / "lengths").read_text() == "7000 7000 "


def test_only_the_failed_one_of_mapped_steps_runs_again(project):
    program = "import os\nimport scrapbook as sb\nopen('tried', 'a').write(str(rows))\n"
    program += "if rows == 2 and not os.path.exists('mended'): raise RuntimeError('no')\nsb.glue('rows', rows)"
    project.notebook("10_count", "rows: int = 3", program)
    project.notebook(
        "30_total", "counts: list = []", "import scrapbook as sb\nsb.glue('total', sum(c['rows'] for c in counts))"
    )
    project.mlpkg("run", "mapped", code=1)
    (project.root / "notebooks" / "mended").touch()
    project.mlpkg("run", "mapped", "--resume")
    (run,) = project.pipeline_runs("mapped")
    assert sorted((project.root / "notebooks" / "tried").read_text()) == ["1", "2", "2"]
    assert project.steps(run)["total"].data.metrics["total"] == 3


def test_a_killed_run_goes_on_but_not_one_that_lives(parcels):
    notebooks = parcels.root / "notebooks"
    (notebooks / "wait").touch()
    running = parcels.start(sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "parcels")
    wait_for(lambda: len([run for found in parcels.pipeline_runs("parcels") for run in parcels.steps(found)]) == 2)
    alive = said(parcels.mlpkg("run", "parcels", "--resume", code=2))
    assert f"of parcels is still being executed, by process {running.pid} on" in alive
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    (notebooks / "wait").unlink()
    (notebooks / "mended").touch()
    parcels.mlpkg("run", "parcels", "--resume")
    (run,) = parcels.pipeline_runs("parcels")
    assert run.info.status == "FINISHED"
    assert steps_of(parcels, run) == [went_on[0], ("check", "KILLED", "1"), *went_on[2:]]


def test_a_task_that_the_dag_file_does_not_have_any_more(parcels):
    parcels.mlpkg("run", "parcels", code=1)
    (parcels.root / "dags" / "parcels.py").write_text(DAG.replace('"20_check", ', ""))
    output = said(parcels.mlpkg("run", "parcels", "--resume", code=2))
    assert "DAG 'parcels' has no task check any more" in output and "Put the task back, or start a new run" in output
    assert parcels.pipeline_runs("parcels")[0].info.status == "FAILED"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/version", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.parametrize("more", [["--downstream"], ["--only-failed", "--downstream"]])
def test_a_task_that_is_cleared_in_airflow_goes_on_in_the_same_way(parcels, more):
    parcels.mlpkg("run", "parcels", code=1)
    (parcels.root / "notebooks" / "mended").touch()
    parcels.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    env = parcels.env | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    main = "from mlpkg.cli.main import main; main()"
    port = free_port()
    airflow = parcels.start(sys.executable, "-c", main, "ui", "airflow", "--port", str(port), **env)
    try:
        wait_for(lambda: answers(port), seconds=200, what="Airflow's API, which tasks report to")
        clear = (
            "import sys; from mlpkg.airflow.home import use_airflow; from mlpkg.settings import load_settings;"
            "use_airflow(load_settings()); sys.argv[0] = 'airflow'; from airflow.__main__ import main; main()"
        )
        done = parcels.start(
            sys.executable, "-c", clear, "tasks", "clear", "parcels", "--task-regex", "check", "--yes", *more
        )
        output, _ = done.communicate(timeout=200)
        assert done.returncode == 0 and "Nothing to clear" not in output, output

        def over() -> bool:
            with sqlite3.connect(parcels.root / "var" / "airflow" / "airflow.db") as database:
                states = {state for (state,) in database.execute("select state from dag_run where dag_id = 'parcels'")}
            return states <= {"success", "failed"}

        wait_for(over, seconds=240, what="Airflow's scheduler to go on")
    finally:
        os.killpg(airflow.pid, signal.SIGTERM)
        airflow.wait(timeout=60)
    (run,) = parcels.pipeline_runs("parcels")
    assert steps_of(parcels, run) == went_on
    assert parcels.steps(run)["check"].data.metrics["seen"] == 5, json.dumps(dict(run.data.tags))
    if "--only-failed" in more:  # the tasks that open and close the run were not among those
        assert run.info.status == "RUNNING"
        assert f"closed run {run.info.run_id}: its DAG run is over" in parcels.mlpkg("sync")
        (run,) = parcels.pipeline_runs("parcels")
    assert run.info.status == "FINISHED"


BEGINNING = """import os, time

from airflow.sdk import DAG, task

from mlpkg.airflow.dags import notebook_steps, recorded_run


@task
def look():
    open("looking", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.1)


with DAG("slow", schedule=None, default_args={"retries": 0}):
    with recorded_run(after=look()):
        notebook_steps("notebooks", "30_report")
"""


def test_a_run_that_has_just_begun_is_not_taken_over(parcels):
    (parcels.root / "dags" / "slow.py").write_text(BEGINNING)
    running = parcels.start(sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "slow")
    wait_for((parcels.root / "looking").exists)
    refused = said(parcels.mlpkg("run", "slow", "--resume", code=2))
    assert "a run of slow has just begun, and is not recorded yet" in refused
    (parcels.root / "go").touch()
    assert running.wait(300) == 0
    assert [run.info.status for run in parcels.pipeline_runs("slow")] == ["FINISHED"]


def test_a_run_that_was_killed_before_it_was_recorded_goes_on_and_leaves_no_lock(parcels):
    (parcels.root / "dags" / "slow.py").write_text(BEGINNING)
    running = parcels.start(sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "slow")
    wait_for((parcels.root / "looking").exists)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    (parcels.root / "go").touch()
    parcels.mlpkg("run", "slow", "--resume")
    assert [run.info.status for run in parcels.pipeline_runs("slow")] == ["FINISHED"]
    assert not [file.name for file in (parcels.root / "var" / "airflow").rglob("*resume*") if file.is_file()]
