"""Assets: what an updated table or an alarm starts, in Airflow's own records. A page cannot show DAG runs."""

import sys

import pytest

DAGS = """
from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import Notify, emit_if, notebook_step, recorded_run, require_champion

with DAG("producer", schedule=None, params={"rows": 3}):
    with recorded_run():
        judge = notebook_step("notebooks", "30_judge", outlets=[Asset("rows")], event_extra=["rows"])
        emit_if(judge, "alarm", Asset("alarm"), on_success_callback=Notify("raised"))

with DAG("consumer", schedule=[Asset("rows")], params={"rows": 0}):
    with recorded_run():
        notebook_step("notebooks", "10_count")

with DAG("fireman", schedule=[Asset("alarm")], params={"reason": ""}):
    with recorded_run():
        notebook_step("notebooks", "40_act")

with DAG("both", schedule=(Asset("rows") & Asset("alarm"))):
    with recorded_run():
        require_champion("nobody") >> notebook_step("notebooks", "20_report")
"""
JUDGE = """import scrapbook as sb
sb.glue('alarm', rows > 4)
sb.glue('verdict', f'{rows} rows')"""


@pytest.fixture
def assets(project):
    (project.root / "dags" / "assets.py").write_text(DAGS)
    project.notebook("30_judge", "rows: int = 1", JUDGE)
    project.notebook("40_act", "reason: str = ''  # Why", "print(reason)")
    return project


def test_only_an_alarm_starts_what_waits_for_it(assets):
    output = assets.mlpkg("run", "producer", "--follow")
    assert "producer succeeded" in output and "consumer succeeded" in output
    (consumer,) = assets.pipeline_runs("consumer")
    assert consumer.data.params["rows"] == "3", "the event says how many rows there are"
    assert not assets.pipeline_runs("fireman") and not assets.pipeline_runs("both")


def test_an_alarm_says_why_and_where_to_read_more(assets):
    output = assets.mlpkg("run", "producer", "--follow", "-p", "rows=5")
    assert "fireman succeeded" in output
    assert "model 'nobody' has no champion yet: train one first" in output, "who skips steps says why"
    (fireman,) = assets.pipeline_runs("fireman")
    assert fireman.data.params["reason"] == "alarm: 5 rows"
    (both,) = assets.pipeline_runs("both")
    assert both.info.status == "FINISHED" and not assets.steps(both), "without a champion the step is skipped"
    (producer,) = assets.pipeline_runs("producer")
    judge = assets.steps(producer)["judge"].info.run_id
    log = next((assets.root / "var" / "airflow" / "logs").glob("mlpkg-run-*.log")).read_text()
    told = log[log.index("producer: alarm raised") :]
    assert "5 rows" in told and judge in told, "the message links to the notebook of the step that saw it"


def test_without_follow_nothing_is_started(assets):
    assert "consumer" not in assets.mlpkg("run", "producer")


TWICE = """
from mlpkg.airflow.home import use_airflow
from mlpkg.airflow.local import load_dags, run_dag, triggered
from mlpkg.settings import load_settings

settings = load_settings()
use_airflow(settings)
known = load_dags(settings)
for rows in (4, 0):
    for dag, conf in triggered(known, run_dag(settings, known["producer"], {"rows": rows})):
        run_dag(settings, dag, conf)
run_dag(settings, known["consumer"])
"""


def test_parameters_from_an_event_do_not_outlive_its_run(assets):
    process = assets.start(sys.executable, "-c", TWICE)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    runs = reversed(assets.pipeline_runs("consumer"))
    assert [run.data.params["rows"] for run in runs] == ["4", "0", "0"], "0 is also the default of the DAG"
