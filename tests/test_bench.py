"""The benchmarks start, and the plain script trains and registers a model, as the notebooks do."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from scipy import stats

from mlpkg.data.lake import open_lake
from mlpkg.examples.flights import seed_lake


@pytest.mark.parametrize(
    ("name", "option"), [("train", "--months"), ("batch", "--times"), ("serve", "--seconds"), ("alarms", "--only")]
)
def test_help(name, option):
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and option in done.stdout, done.stderr


def test_every_rate_of_alarms_has_its_number_of_trials_and_its_exact_interval():
    rows = json.loads((ROOT / "bench" / "alarms.json").read_text())
    assert {row["case"] for row in rows} >= {"as usual", "no truth", "600 held-out rows", "one large day"}
    for row in rows:
        interval = stats.binomtest(row["alarms"], row["trials"]).proportion_ci(method="exact")
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), abs=1e-4), row


def test_a_run_of_alarms_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import alarms

    def cell(case: str, length: str, code: str, count: int) -> list[dict]:
        return [{"case": case, "window": length, "change": "nothing", "code": code, "alarms": count}]

    monkeypatch.setattr(alarms, "RESULT", tmp_path / "alarms.json")
    assert alarms.known() == [] and len(alarms.left("", "new")) == len(alarms.CELLS)
    for case, length, code, count in (("as usual", "day", "old", 9), ("no truth", "day", "new", 0)):
        alarms.keep(cell(case, length, code, count))
    alarms.keep(cell("as usual", "day", "new", 1))
    assert [(row["case"], row["alarms"]) for row in alarms.known()] == [("no truth", 0), ("as usual", 1)]
    left = {(one.case, one.length) for one in alarms.left("", "new")}
    assert len(left) == len(alarms.CELLS) - 2 and ("no truth", "week") in left and ("no truth", "day") not in left
    assert {one.case for one in alarms.left("held", "old")} == {one for one in alarms.CASES if "held" in one}
    assert [path.name for path in tmp_path.iterdir()] == ["alarms.json"]


BURN = """import papermill, sys
papermill.execute_notebook(sys.argv[1], "out.ipynb", progress_bar=False)"""


@pytest.mark.parametrize("warm", ["yes", "no"])
def test_the_work_of_a_kernel_counts_wherever_it_was_forked(project, monkeypatch, warm):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from measure import measure

    burn = "import time\nwhile time.process_time() < 4: pass\nx = bytearray(300_000_000)\nx[::4096] = x[::4096]\n"
    notebook = project.notebook("90_burn", "a: int = 0", burn + "time.sleep(2)")
    env = project.env | {"MLPKG_KERNELS__WARM": warm, "JUPYTER_DEFAULT_PROVISIONER_NAME": "mlpkg-warm"}
    command = [sys.executable, "-c", BURN, str(notebook)]
    for _ in range(2):  # the first one starts the template
        taken = measure(command, project.root, env, project.root / "log")
    assert taken.cpu_seconds >= 4 and taken.peak_mb >= 300


def test_the_plain_script_trains_and_registers(project):
    seed_lake(open_lake(project.settings), "2013-01", rows=1500)
    job = json.dumps({"candidates": ["logistic_regression"], "budget": 0, "seed": 0})
    process = project.start(sys.executable, str(ROOT / "bench" / "plain.py"), job)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    tags = project.mlflow.get_model_version("flights", "1").tags
    assert tags["candidate"] == "logistic_regression" and 0.5 < float(tags["metric.roc_auc"]) < 0.8
