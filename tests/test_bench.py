"""The benchmarks start, and the plain script trains and registers a model, as the notebooks do."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from mlpkg.data.lake import open_lake
from mlpkg.examples.flights import seed_lake


@pytest.mark.parametrize(("name", "option"), [("train", "--months"), ("batch", "--times"), ("serve", "--seconds")])
def test_help(name, option):
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and option in done.stdout, done.stderr


def test_the_plain_script_trains_and_registers(project):
    seed_lake(open_lake(project.settings), "2013-01", rows=1500)
    job = json.dumps({"candidates": ["logistic_regression"], "budget": 0, "seed": 0})
    process = project.start(sys.executable, str(ROOT / "bench" / "plain.py"), job)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    tags = project.mlflow.get_model_version("flights", "1").tags
    assert tags["candidate"] == "logistic_regression" and 0.5 < float(tags["metric.roc_auc"]) < 0.8
