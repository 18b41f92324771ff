"""When the watch step asks for a training: with real runs in MLflow, a real table, and the step as a process."""

import time

import pandas as pd
import pytest
from conftest import ROOT

from mlpkg.data.lake import Lake
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import end_run, open_pipeline_run


@pytest.fixture
def watched(project):
    "A project with a table of the monitor, and ways to train and to watch"
    lake = Lake(project.settings.lake.root)

    def judge(month: str, alarm: bool) -> None:
        rows = pd.DataFrame({"month": [month], "alarm": [alarm], "words": [f"late flights of {month}"]})
        lake.write("monitoring/flights", rows, mode="replace", partition={"month": month})
        time.sleep(0.01)

    def train(name: str, status: str = "FINISHED") -> str:
        run_id = open_pipeline_run(project.mlflow, project.settings, "flights_train", name)
        if status != "RUNNING":
            end_run(project.mlflow, run_id, status)
        return run_id

    def watch() -> tuple[bool, str]:
        scraps = run_step(ROOT / "nbs/pipelines/flights/40_watch.ipynb", settings=project.settings).scraps
        return scraps["retrain"], scraps["verdict"]

    project.judge, project.train, project.watch = judge, train, watch
    return project


def test_an_old_month_that_is_judged_again_does_not_reopen_an_alarm_that_was_answered(watched):
    watched.judge("2013-04", False)
    watched.judge("2013-10", True)
    watched.train("answer")
    watched.judge("2013-04", True)
    assert watched.watch() == (False, "no reason to train again")
    watched.judge("2013-11", True)
    assert watched.watch() == (True, "unanswered alarm of 2013-11: late flights of 2013-11")


def test_a_training_that_runs_or_keeps_failing_is_not_asked_for_every_hour(watched, monkeypatch):
    watched.train("first")
    watched.judge("2013-10", True)
    running = watched.train("second", "RUNNING")
    retrain, verdict = watched.watch()
    assert not retrain and "unanswered alarm of 2013-10" in verdict and "a training is running" in verdict
    end_run(watched.mlflow, running, "FAILED")
    retrain, verdict = watched.watch()
    assert not retrain and "1 training has failed since the last that succeeded" in verdict
    monkeypatch.setenv("MLPKG_AIRFLOW__RETRAIN_WAIT", "0.0000001")
    assert watched.watch()[0]
