"""What loading a model may and may not do, and what the rules decide.

Code that runs would leave a trace, so a missing trace shows that it did not run. That does not fit a page.
"""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from mlpkg.data.lake import Lake
from mlpkg.data.pins import version_mark
from mlpkg.models.candidates import candidates
from mlpkg.models.comparison import Comparison, decide
from mlpkg.models.holdout import HoldoutRule, Learner, fair_rows
from mlpkg.models.oversight import history
from mlpkg.models.paired import Measurement
from mlpkg.models.registry import RegistryError, champion, get_version, load_model, register, versions
from mlpkg.models.scoring import probability
from mlpkg.models.storage import UntrustedModelError, download, log_model, read_folder, trusted_types
from mlpkg.models.training import fit
from mlpkg.settings import PromotionSettings, SettingsError
from mlpkg.testing import settings_text, temporary_store

NUMERIC, CATEGORICAL = ["distance", "weight"], ["carrier"]


@pytest.fixture(scope="module", autouse=True)
def store():
    "A temporary MLflow store"
    with temporary_store() as store:
        yield store


@pytest.fixture(scope="module")
def parcels() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    distance, carrier = rng.uniform(5, 900, 1500), rng.choice(["blue", "red", None], 1500)
    weight = np.where(rng.uniform(size=1500) < 0.2, np.nan, rng.gamma(2, 3, 1500))
    late = rng.uniform(size=1500) < 1 / (1 + np.exp(2 - distance / 400))
    return pd.DataFrame({"distance": distance, "weight": weight, "carrier": carrier, "late": late})


def logged(parcels: pd.DataFrame, name: str = "logistic_regression") -> str:
    "Log a small model and return its URI"
    return log_model(fit(name, parcels, "late", NUMERIC, CATEGORICAL), parcels[NUMERIC + CATEGORICAL])


def parts(*months: str) -> pd.DataFrame:
    "Ten days of each month; the last month is held out"
    days = [f"{month}-{day}" for month in months for day in range(10, 20)]
    table = pd.DataFrame({"day": [day for day in days for _ in range(30)], "distance": 1.0, "late": 0})
    return table.assign(part=["holdout" if day.startswith(months[-1]) else "train" for day in table["day"]])


@pytest.mark.parametrize("way", ["made anew", "restored"])
def test_a_model_is_not_judged_by_rows_that_have_the_number_of_those_it_has_learned_from(parcels, tmp_path, way):
    rule = HoldoutRule("split/p", [("part", "=", "holdout")], [("part", "=", "train")], ("day",))
    lake, rules = Lake(tmp_path / "lake"), PromotionSettings(min_rows=200, min_blocks=5)

    def write(*months: str) -> int:
        return lake.write("split/p", parts(*months), mode="overwrite")

    write("01")
    shutil.copytree(f"{lake.root}/split/p", tmp_path / "backup")
    version = write("01", "02", "03")
    tables = {"split/p": version}
    about = {"tables": tables, "marks": {"split/p": version_mark(lake, "split/p", version)}}
    pipeline = fit("logistic_regression", parcels, "late", NUMERIC, CATEGORICAL)
    uri = log_model(pipeline, parcels[NUMERIC + CATEGORICAL], metadata=about)
    name = f"model_{way[:4]}"
    champion = get_version(name, register(uri, name, tables))

    def judge(version) -> str:
        return fair_rows(lake, rule, [Learner("champion", ["distance"], version.tables, version.marks)], rules).problem

    assert judge(champion) == ""
    shutil.rmtree(f"{lake.root}/split/p")
    if way == "restored":
        shutil.copytree(tmp_path / "backup", f"{lake.root}/split/p")
    else:
        write("01")
    assert "was made from version 1 of split/p: table 'split/p' has no version 1" in judge(champion)
    assert write("01", "02") == version, "February, which the champion has learned from, is held out"
    assert "made anew or restored from a backup since. Decide by hand" in judge(champion)
    older = replace(champion, tags={})
    found = fair_rows(lake, rule, [Learner("champion", ["distance"], older.tables, older.marks)], rules)
    assert (found.problem, len(found.rows)) == ("", 300) and "its number is trusted: champion" in found.note


def stored(uri: str) -> Path:
    "Folder of a logged model"
    location = MlflowClient().get_logged_model(uri.removeprefix("models:/")).artifact_location
    return Path(location.removeprefix("file://"))


@pytest.mark.parametrize("candidate", sorted(candidates))
def test_a_stored_model_answers_bit_for_bit_the_same(candidate, parcels):
    pipeline = fit(candidate, parcels, "late", NUMERIC, CATEGORICAL)
    uri = log_model(pipeline, parcels[NUMERIC + CATEGORICAL])
    loaded = load_model(candidate, register(uri, candidate))
    np.testing.assert_array_equal(probability(loaded.pipeline, parcels), probability(pipeline, parcels))
    assert loaded.columns == {"distance": "double", "weight": "double", "carrier": "string"}
    other = mlflow.pyfunc.load_model(uri).predict(parcels[NUMERIC + CATEGORICAL])
    np.testing.assert_array_equal(other[:, 1], probability(pipeline, parcels))
    assert stored(uri).stat().st_size < 5e6
    assert "model.skops" in [file.name for file in stored(uri).iterdir()]


def test_the_model_belongs_to_the_run_that_the_environment_names(parcels, monkeypatch):
    client = MlflowClient()
    experiment = mlflow.active_run().info.experiment_id
    mlflow.end_run()
    run_id = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    pipeline = fit("logistic_regression", parcels, "late", NUMERIC, CATEGORICAL)
    uri = log_model(pipeline, parcels[NUMERIC + CATEGORICAL])
    mlflow.end_run()
    model = client.get_logged_model(uri.removeprefix("models:/"))
    assert (model.source_run_id, model.experiment_id) == (run_id, experiment)
    assert get_version("environment", register(uri, "environment")).run_id == run_id


def forge(uri: str, module: str, name: str) -> None:
    "Replace a type in a stored skops file, and list it as trusted in its MLmodel file"
    file = stored(uri) / "model.skops"
    with zipfile.ZipFile(file) as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    schema = json.loads(content["schema.json"])
    schema["__class__"], schema["__module__"], schema["__loader__"] = name, module, "ObjectNode"
    content["schema.json"] = json.dumps(schema).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)
    description = stored(uri) / "MLmodel"
    known = "    - numpy.dtype\n"
    assert known in description.read_text()
    description.write_text(description.read_text().replace(known, f"{known}    - {module}.{name}\n"))


def test_a_type_that_is_not_trusted_is_named_and_not_even_imported(parcels, tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()\nclass Evil:\n    def __setstate__(self, state): pass\n"
    (tmp_path / "evilmodule.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    uri = logged(parcels)
    version = register(uri, "evil")
    forge(uri, "evilmodule", "Evil")
    with pytest.raises(UntrustedModelError, match=r"model 'evil' version 1 contains types .*: evilmodule\.Evil\. If"):
        load_model("evil", version)
    assert not trace.exists()
    mlflow.sklearn.load_model(f"models:/evil/{version}")
    assert trace.exists(), "MLflow alone trusts what the model says about itself; if that changes, this test is moot"


class Bomb:
    "Leaves a trace when it is unpickled"

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_is_refused_without_being_opened(parcels, tmp_path):
    trace = tmp_path / "trace"
    pipeline = fit("logistic_regression", parcels, "late", NUMERIC, CATEGORICAL)
    uri = mlflow.sklearn.log_model(
        pipeline, name="model", serialization_format="pickle", pip_requirements=["scikit-learn"]
    ).model_uri
    (stored(uri) / "model.pkl").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UntrustedModelError, match="is stored as pickle, and loading that may run any code"):
        register(uri, "bomb")
    version = mlflow.register_model(uri, "bomb").version
    with pytest.raises(UntrustedModelError, match="model 'bomb' version 1 is stored as pickle"):
        load_model("bomb", version)
    assert not trace.exists()


def test_a_pickle_that_is_called_skops_is_refused(parcels, tmp_path):
    uri = logged(parcels)
    register(uri, "disguised")
    (stored(uri) / "model.skops").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(UntrustedModelError, match="model 'disguised' version 1: model.skops is not a readable skops"):
        load_model("disguised", 1)
    assert not (tmp_path / "trace").exists()


def test_a_model_file_outside_its_folder_is_refused(parcels):
    uri = logged(parcels)
    register(uri, "elsewhere")
    description = stored(uri) / "MLmodel"
    description.write_text(description.read_text().replace("pickled_model: model.skops", "pickled_model: /etc/passwd"))
    with pytest.raises(UntrustedModelError, match="passwd is not a readable skops file"):
        load_model("elsewhere", 1)


def test_another_version_of_scikit_learn_gives_a_warning(parcels):
    uri = logged(parcels)
    register(uri, "old")
    description = stored(uri) / "MLmodel"
    text = description.read_text()
    line = next(line for line in text.splitlines() if "sklearn_version" in line)
    description.write_text(text.replace(line, "    sklearn_version: 1.2.3"))
    with pytest.warns(UserWarning, match="fitted with scikit-learn 1.2.3, this process has"):
        load_model("old", 1)


def test_every_trusted_type_exists_and_is_needed(parcels):
    import importlib

    import skops.io

    for name in trusted_types:
        module, _, kind = name.rpartition(".")
        assert hasattr(importlib.import_module(module), kind)
    timed = parcels.assign(sent=pd.date_range("2026-01-01", periods=len(parcels), freq="h", tz="UTC"))
    fitted = [fit(name, timed, "late", [*NUMERIC, "sent"], CATEGORICAL) for name in candidates]
    used = {kind for model in fitted for kind in skops.io.get_untrusted_types(data=skops.io.dumps(model))}
    assert used == set(trusted_types)


OWN = """from types import SimpleNamespace

from sklearn.base import BaseEstimator, TransformerMixin


class Same(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X


recipe = SimpleNamespace(trusted={"teamtypes.Same": "does nothing"})
"""


def test_a_type_for_which_a_recipe_vouches_is_stored_and_loaded(parcels, store, tmp_path, monkeypatch):
    from sklearn.pipeline import make_pipeline

    (tmp_path / "teamtypes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    import teamtypes
    from sklearn.linear_model import LogisticRegression

    own = make_pipeline(teamtypes.Same(), LogisticRegression()).fit(parcels[["distance"]], parcels["late"].astype(int))
    with pytest.raises(UntrustedModelError, match=r"teamtypes.Same.*Recipe\(..., trusted="):
        log_model(own, parcels[["distance"]])
    settings = tmp_path / "settings.ini"
    settings.write_text(settings_text() + "\n[model parcels]\npipeline.recipe = teamtypes:recipe\n")
    monkeypatch.setenv("MLPKG_SETTINGS", str(settings))
    uri = log_model(own, parcels[["distance"]])
    found = read_folder(download(uri, tmp_path / "model"), "the model")
    assert isinstance(found.pipeline[0], teamtypes.Same)
    settings.write_text(settings_text() + "\n[model parcels]\npipeline.recipe = nowhere:recipe\n")
    with pytest.raises(SettingsError, match="'nowhere:recipe' cannot be imported"):
        read_folder(tmp_path / "model", "the model")


def known(value: float, error: float | None = 0.001) -> Measurement:
    return Measurement(value, error, freedom=30.0)


KNOWN = {"roc_auc": 0.7, "brier": 0.1}
FIRST = {"gains": {"roc_auc": known(0.2)}}
GOOD, FINE = FIRST | {"quality": {"roc_auc": known(0.7)}}, FIRST | {"quality": {"brier": known(0.1)}}
SAME = {"roc_auc": known(0.0), "brier": known(0.0)}
ONE = {"tolerance": {}}  # One way to win, with 97.5 %, where t is 2.042
TWO = {"margin": {"roc_auc": 0.001, "brier": 0.001}}


@pytest.mark.parametrize(
    ("found", "rules", "promote", "reason"),
    [
        (FIRST, {}, True, "there is no champion yet"),
        (
            {"gains": {"roc_auc": known(0.002)}},
            {},
            False,
            "against chance: a gain of +0.0020, -0.0000 at",
        ),
        ({}, {}, False, "it is not known by how much roc_auc is better"),
        (
            FIRST | {"quality": {"roc_auc": known(0.7)}},
            {"minimum": {"roc_auc": 0.699}},
            False,
            "at least 0.6980, misses",
        ),
        (
            FIRST | {"quality": {"roc_auc": known(0.7)}},
            {"minimum": {"roc_auc": 0.697}},
            True,
            "every minimum is reached",
        ),
        (FIRST, {"minimum": {"roc_auc": 0.6}}, False, "it is not known how good roc_auc is at least, 0.6"),
        (
            FIRST | {"quality": {"roc_auc": known(0.9, None)}},
            {"minimum": {"roc_auc": 0.6}},
            False,
            "it is not known how",
        ),
        (FINE, {"minimum": {"brier": 0.101}}, False, "at most 0.1020, misses"),
        (FINE, {"minimum": {"brier": 0.103}}, True, "no champion"),
        ({"champion": 1, "gains": {"roc_auc": known(0.0031)}}, ONE, True, "+0.0011 at least; more than +0.001"),
        ({"champion": 1, "gains": {"roc_auc": known(0.0030)}}, ONE, False, "so +0.0030 would have won"),
        ({"champion": 1, "gains": {"roc_auc": known(0.0031)}, "uses": 2}, ONE, False, "99.17%"),
        (
            {"champion": 1, "gains": {"roc_auc": known(0.0)}},
            {"margin": {"roc_auc": 0}, "tolerance": {}},
            False,
            "than +0",
        ),
        ({"champion": 1, "gains": {"roc_auc": known(-0.1)}}, ONE, False, "a gain of -0.1000, -0.1020 at least"),
        ({"champion": 1, "gains": {"roc_auc": known(0.02, None)}}, ONE, False, "it is not known by how much roc_auc"),
        ({"champion": 1, "gains": {}}, ONE, False, "it is not known by how much roc_auc is better"),
        ({"champion": 1, "gains": SAME | {"roc_auc": known(0.05)}}, {}, True, "roc_auc"),
        ({"champion": 1, "gains": SAME | {"brier": known(0.05)}}, {}, False, "roc_auc"),
        ({"champion": 1, "gains": SAME | {"brier": known(0.05)}}, TWO, True, "brier"),
        ({"champion": 1, "gains": {"roc_auc": known(0.05), "brier": known(-0.0026)}}, {}, False, "-0.0025 is"),
        ({"champion": 1, "gains": {"roc_auc": known(0.05), "brier": known(-0.0025)}}, {}, True, "roc_auc"),
        ({"champion": 1, "gains": {"roc_auc": known(-0.05), "brier": known(0.05)}}, TWO, False, "although brier"),
        ({"champion": 1, "gains": {"roc_auc": known(0.05)}}, {}, False, "by how much brier is better; no less than"),
        ({"problem": "too little to judge by"}, {}, False, "too little to judge by"),
    ],
)
def test_decide(found, rules, promote, reason):
    decision = decide(Comparison(**{"problem": "", "metrics": KNOWN, **found}), PromotionSettings(**rules))
    assert decision.promote is promote
    assert reason in "; ".join(decision.reasons)


def test_a_model_that_nobody_registered():
    assert champion("nobody") is None
    assert versions("nobody") == []
    assert history("nobody").empty
    with pytest.raises(RegistryError, match="no model 'nobody' in the registry"):
        load_model("nobody")


@pytest.mark.parametrize("module", ["storage", "record", "registry", "comparison", "promotion"])
def test_importing_a_module_imports_nothing_heavy(module):
    heavy = "mlflow sklearn skops pandas"
    code = f"import sys, mlpkg.models.{module}; print([m for m in {heavy.split()} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"  # noqa: S603
