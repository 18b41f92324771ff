"""The same model in every process and with any number of threads, and for every dtype a column may come in.

A notebook runs in one process with one setting of threads, so neither can be shown in its page.
"""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from mlpkg.models.candidates import Candidate, candidates
from mlpkg.models.scoring import probability
from mlpkg.models.training import fit, importances, search

NUMERIC, CATEGORICAL = ["weight", "distance", "express"], ["carrier", "city"]


def parcels(rows: int = 3000) -> pd.DataFrame:
    "A table with numbers, a boolean, categories, missing values and a label that depends on them"
    rng = np.random.default_rng(1)
    data = pd.DataFrame(
        {
            "weight": rng.gamma(2.0, 3.0, rows),
            "distance": rng.integers(5, 900, rows),
            "express": rng.uniform(size=rows) < 0.3,
            "carrier": rng.choice(["blue", "green", "red"], rows),
            "city": rng.choice([f"city {i:02d}" for i in range(60)], rows),
        }
    )
    data["late"] = rng.uniform(size=rows) < 1 / (1 + np.exp(2 - data.distance / 400 - (data.carrier == "red")))
    data.loc[rng.uniform(size=rows) < 0.1, ["weight", "carrier"]] = None
    return data


FINGERPRINT = """
import hashlib, sys
sys.path.insert(0, {folder!r})
from test_training import CATEGORICAL, NUMERIC, parcels
from mlpkg.models.scoring import probability
from mlpkg.models.training import search
data = parcels()
for name in ("logistic_regression", "random_forest", "hist_gradient_boosting"):
    result = search(name, data[:2000], data[2000:], "late", NUMERIC, CATEGORICAL, budget=3, row_cap=1500)
    digest = hashlib.sha256(probability(result.pipeline, data).tobytes()).hexdigest()
    print("fingerprint", name, result.trials["value"].tolist(), digest)
"""


def fingerprints(threads: int) -> list[str]:
    "Scores and probabilities of every candidate, from a process with this many threads"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
    env = {**os.environ, **dict.fromkeys(names, str(threads))}
    code = FINGERPRINT.format(folder=os.path.dirname(__file__))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)  # noqa: S603
    return [line for line in done.stdout.splitlines() if line.startswith("fingerprint")]


def test_same_digits_in_another_process_and_with_other_threads():
    two = fingerprints(2)
    assert len(two) == 3
    assert two == fingerprints(2)
    assert two == fingerprints(1)


@pytest.mark.parametrize("name", sorted(candidates))
@pytest.mark.parametrize(
    "dtypes",
    [
        {"carrier": object, "city": object},
        {"carrier": "category", "city": "category"},
        {"carrier": "string", "city": "string"},
        {"weight": "Float64", "distance": "Int64", "express": "boolean"},
        {"weight": object, "distance": object, "express": object},
    ],
    ids=["object", "category", "string", "nullable", "object-numbers"],
)
def test_dtype_of_a_column_does_not_matter(name, dtypes):
    data = parcels()
    model = fit(name, data, "late", NUMERIC, CATEGORICAL)
    other = data.astype(dtypes)
    expected = probability(model, data)
    np.testing.assert_array_equal(probability(model, other), expected)
    np.testing.assert_array_equal(probability(fit(name, other, "late", NUMERIC, CATEGORICAL), data), expected)


@pytest.mark.parametrize("name", sorted(candidates))
def test_columns_that_are_all_missing(name):
    data = parcels().assign(weight=np.nan, carrier=None)
    p = probability(fit(name, data, "late", NUMERIC, CATEGORICAL), data)
    assert np.isfinite(p).all()


@pytest.mark.parametrize("name", sorted(candidates))
@pytest.mark.parametrize(("numeric", "categorical"), [(NUMERIC, []), ([], CATEGORICAL)], ids=["numbers", "categories"])
def test_one_kind_of_column_is_enough(name, numeric, categorical):
    data = parcels()
    assert np.isfinite(probability(fit(name, data, "late", numeric, categorical), data)).all()


def test_a_candidate_is_added_in_one_line(monkeypatch):
    from sklearn.ensemble import ExtraTreesClassifier

    monkeypatch.setitem(candidates, "extra_trees", Candidate(ExtraTreesClassifier(20, max_leaf_nodes=32)))
    data = parcels()
    result = search("extra_trees", data[:2000], data[2000:], "late", NUMERIC, CATEGORICAL, budget=0)
    assert result.params == {}
    assert result.value > 0.6


def test_an_error_of_the_callback_is_not_swallowed():
    def full(trial):
        raise OSError("disk full")

    data = parcels()
    with pytest.raises(OSError, match="disk full"):
        search("logistic_regression", data[:2000], data[2000:], "late", NUMERIC, CATEGORICAL, on_trial=full)


def test_a_search_that_takes_every_row_copies_none(monkeypatch):
    seen, data = [], parcels(400)
    monkeypatch.setattr(
        "mlpkg.models.training._Plan.predict", lambda plan, params: seen.append(plan.parts[0][0]) or ([0, 1], [0, 1])
    )
    for cap in (None, 0, 400, 399):
        search("logistic_regression", data, data, "late", NUMERIC, CATEGORICAL, budget=1, row_cap=cap)
    assert [train is data for train in seen] == [True, True, True, False]


def test_importances_of_all_rows():
    data = parcels(400)
    pipeline = fit("logistic_regression", data, "late", NUMERIC, CATEGORICAL)
    every = [importances(pipeline, data, "late", NUMERIC, CATEGORICAL, rows=rows) for rows in (0, 400)]
    assert every[0].equals(every[1])
