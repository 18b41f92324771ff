"""Diamonds: the contract, the cleaning, and one run from the sample to a prediction."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlpkg.data.contracts import check
from mlpkg.examples.diamonds import diamonds_contract, recipe
from mlpkg.models.registry import champion
from mlpkg.recipes.delivery import read_delivery
from mlpkg.recipes.preparation import clean_rows
from mlpkg.steps.tracking import connect
from mlpkg.testing import TemporaryStore

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store():
    with TemporaryStore({"airflow.dags": ROOT / "dags"}) as made:
        yield made


def run(*arguments: str) -> str:
    "What `mlpkg` says, in the temporary store"
    command = [sys.executable, "-c", "from mlpkg.cli.main import main; main()", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_contract_accepts_the_sample():
    rows = read_delivery(recipe, recipe.sample).rows
    assert check(rows, diamonds_contract()).bad_rows == 0


def test_cleaning_keeps_every_row_and_is_idempotent():
    rows = read_delivery(recipe, recipe.sample).rows
    table = clean_rows(recipe, rows)
    assert len(table) == len(rows)
    assert table[recipe.features].equals(recipe.clean(table)[recipe.features])


def test_the_pipelines_run_from_the_sample_to_predictions(store):
    train = ("-p", 'candidates=["ridge"]', "-p", "budget=0")
    run("run", "diamonds_etl", "diamonds_train", "-p", f"source={recipe.sample}", *train)
    connect(store.settings)
    if champion("diamonds") is None:  # the sample may be too small for the rules
        run("promote", "1", "--model", "diamonds", "--why", "a test")
    run("run", "diamonds_predict", "diamonds_monitor")
    rows = store.lake.count(recipe.table("clean"))
    assert store.lake.count(recipe.table("predictions")) == rows > 0
    assert store.lake.count(recipe.table("monitoring")) > 0
