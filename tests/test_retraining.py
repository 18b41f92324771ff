"""When the watch step asks for a training: with real runs in MLflow, a real table, and the step as a process."""

import time
from dataclasses import asdict

import pandas as pd
import pandera.pandas as pa
import pytest
from conftest import ROOT

from mlpkg.data.lake import Lake
from mlpkg.models.comparison import as_comparison, decide
from mlpkg.models.splits import SplitRule
from mlpkg.models.tasks import Task
from mlpkg.monitoring.checks import Finding
from mlpkg.monitoring.report import Report
from mlpkg.monitoring.report import store as store_report
from mlpkg.recipes.delivery import add_columns, write_batches
from mlpkg.recipes.judging import judge
from mlpkg.recipes.preparation import clean_batches, split_batches
from mlpkg.recipes.recipe import Recipe, batch_column
from mlpkg.recipes.training import promotion_rules, search_candidate, store_candidate, unlearned_alarms
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import end_run, open_pipeline_run
from mlpkg.testing import parcels, temporary_store


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


def contract():
    return pa.DataFrameSchema(
        {
            "sent": pa.Column("datetime64[us]"),
            "distance": pa.Column(float, pa.Check.in_range(0, 1000)),
            "late": pa.Column(float, pa.Check.isin([0, 1]), nullable=True),
        }
    )


def by_time(**shares) -> Recipe:
    split = SplitRule("time", ("on_day",), **shares)
    task = Task("binary", (0, 1))
    return Recipe("parcels", "late", task, ("distance",), (), contract, split, batch="month", time="sent")


@pytest.fixture(scope="module")
def drifted():
    "A lake with eight months of parcels; the monitor has raised an alarm about the last"
    with temporary_store() as store:
        lake, months = store.lake, [f"2026-0{month}" for month in range(1, 9)]
        table = parcels(2400, months=months)
        table["sent"] = pd.to_datetime(table["month"]) + pd.to_timedelta(table["day"] - 1, "D")
        rows = table[["sent", "distance", "late"]].astype({"late": float, "sent": "datetime64[us]"})
        recipe = by_time()
        write_batches(lake, "raw/parcels", add_columns(rows, recipe, "parcels.csv"), months)
        clean_batches(lake, recipe, months)
        for month, level in zip(months[-2:], ("ok", "alarm"), strict=True):
            found = [Finding("performance", "roc_auc", level, "ROC AUC is 0.5", 0.5)]
            store_report(lake, "monitoring/parcels", Report(month, 300, found), batch_column)
        yield store


def test_a_training_whose_rows_do_not_hold_what_raised_the_alarm_says_so(drifted):
    recipe, lake = by_time(), drifted.lake
    split_batches(lake, recipe)
    words = unlearned_alarms(recipe, lake)
    assert words.startswith("the training learns from none of the 300 rows of 2026-08, which raised an alarm")
    assert "about 600 more rows" in words and "`holdout=0.06` in the SplitRule" in words
    rules = promotion_rules(drifted.settings, recipe)
    version = lake.version("split/parcels")
    parts = lake.read("split/parcels", filters=[("part", "!=", "holdout")])
    result = search_candidate(recipe, parts, "logistic_regression", rules.metric, budget=0)
    uri, _ = store_candidate(recipe, lake, parts, result, version, rules.metric)
    contest = judge(recipe, lake, [{"model_uri": uri}], rules)
    said = as_comparison(asdict(contest.comparison))
    assert decide(said, rules).reasons[-1] == said.summary(rules)["not learned"] == words


def test_a_training_that_has_learned_from_what_raised_the_alarm_says_nothing(drifted):
    lake, recipe = drifted.lake, by_time(holdout=0.06)
    split_batches(lake, by_time())
    before = lake.version("split/parcels")
    split_batches(lake, recipe)
    assert unlearned_alarms(recipe, lake) == ""
    assert unlearned_alarms(recipe, lake, before).startswith("the training learns from none"), "as it was then"


def test_rows_of_an_alarm_whose_outcome_is_not_known_cannot_be_learned(drifted):
    recipe, lake = by_time(holdout=0.06), drifted.lake
    split_batches(lake, recipe)
    found = [Finding("contract", "rows", "alarm", "too few rows", 3)]
    store_report(lake, "monitoring/parcels", Report("2026-09", 3, found), batch_column)
    words = unlearned_alarms(recipe, lake)
    assert words.startswith("no row of 2026-09, which raised an alarm, is in split/parcels: late is not known yet")
    split_batches(lake, by_time())
    assert unlearned_alarms(recipe, lake).startswith(
        f"{words}; the training learns from none of the 300 rows of 2026-08"
    )
