"""What loading a model may and may not do, and that there is always a champion.

Code that runs would leave a trace, so a missing trace shows that it did not run. A thread that keeps asking for the
alias shows that there is never a gap. Neither fits a page.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from mlpkg.models.candidates import candidates
from mlpkg.models.promotion import Decision, _exclusive, decide, history, promote, promote_by_hand, rollback
from mlpkg.models.registry import RegistryError, champion, get_version, load_model, register, versions
from mlpkg.models.scoring import probability
from mlpkg.models.storage import UntrustedModelError, log_model, trusted_types
from mlpkg.models.training import fit
from mlpkg.settings import PromotionSettings
from mlpkg.testing import temporary_store

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
    fitted = [fit(name, parcels, "late", NUMERIC, CATEGORICAL) for name in candidates]
    used = {kind for model in fitted for kind in skops.io.get_untrusted_types(data=skops.io.dumps(model))}
    assert used == set(trusted_types)


NAN = float("nan")


@pytest.mark.parametrize(
    ("challenger", "champion", "rules", "promote", "reason"),
    [
        ({"roc_auc": 0.70}, None, {}, True, "there is no champion yet"),
        ({"roc_auc": 0.70}, None, {"minimum": {"roc_auc": 0.75}}, False, "0.7000 misses the required 0.75"),
        ({"roc_auc": 0.75}, None, {"minimum": {"roc_auc": 0.75}}, True, "reaches every minimum"),
        ({"roc_auc": 0.70}, {"roc_auc": 0.60}, {"minimum": {"roc_auc": 0.75}}, False, "misses"),
        ({"roc_auc": 0.70}, None, {"minimum": {"brier": 0.2}}, False, "brier is not known, at most 0.2"),
        ({"roc_auc": 0.70, "brier": NAN}, None, {"minimum": {"brier": 0.2}}, False, "brier is not known"),
        ({"roc_auc": 0.70, "brier": 0.3}, None, {"minimum": {"brier": 0.2}}, False, "brier 0.3000 misses"),
        ({"roc_auc": 0.70, "brier": 0.1}, None, {"minimum": {"brier": 0.2}}, True, "no champion"),
        ({"roc_auc": 0.701}, {"roc_auc": 0.70}, {"margin": 0.001}, True, "better by 0.0010"),
        ({"roc_auc": 0.7009}, {"roc_auc": 0.70}, {"margin": 0.001}, False, "better by 0.0009"),
        ({"roc_auc": 0.70}, {"roc_auc": 0.70}, {"margin": 0}, False, "better by 0.0000"),
        ({"roc_auc": 0.60}, {"roc_auc": 0.70}, {"margin": 0}, False, "better by -0.1000"),
        ({"roc_auc": NAN}, None, {}, False, "roc_auc of the challenger is not known"),
        ({"roc_auc": NAN}, {"roc_auc": 0.1}, {}, False, "roc_auc of the challenger is not known"),
        ({}, {"roc_auc": 0.1}, {}, False, "roc_auc of the challenger is not known"),
        ({"roc_auc": 0.70}, {"roc_auc": NAN}, {}, False, "roc_auc of the champion is not known"),
        ({"roc_auc": 0.70}, {}, {}, False, "roc_auc of the champion is not known"),
        ({"log_loss": 0.4}, {"log_loss": 0.5}, {"metric": "log_loss"}, True, "better by 0.1000"),
        ({"brier": 0.21}, {"brier": 0.20}, {"metric": "brier"}, False, "better by -0.0100"),
    ],
)
def test_decide(challenger, champion, rules, promote, reason):
    decision = decide(challenger, champion, PromotionSettings(**rules))
    assert decision.promote is promote
    assert reason in "; ".join(decision.reasons)


def test_a_metric_without_a_better_direction_cannot_decide():
    with pytest.raises(ValueError, match="metric 'base_rate' does not say which model is better"):
        decide({"base_rate": 0.2}, None, PromotionSettings(metric="base_rate"))


@pytest.fixture
def contest(parcels, request):
    "A model with three versions, none of them champion"
    uris = [logged(parcels) for _ in range(3)]
    return request.node.name, [register(uri, request.node.name) for uri in uris]


def test_promotion_leaves_no_gap(contest):
    name, numbers = contest
    promote(name, numbers[0], Decision(True, ["first"]))
    seen, failures, done = set(), [], threading.Event()

    def ask():
        client = MlflowClient()
        while not done.is_set():
            try:
                seen.add(int(client.get_model_version_by_alias(name, "champion").version))
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    writers = [
        threading.Thread(target=lambda n=n: [promote(name, n, Decision(True, ["again"])) for _ in range(8)])
        for n in numbers[1:]
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert seen & set(numbers[1:])
    assert champion(name).version in numbers[1:]


PROMOTE = """
import sys
import mlflow
from mlpkg.models.promotion import Decision, promote
from mlpkg.models.registry import RegistryError
uri, name, version, against = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_registry_uri(uri)
mlflow.MlflowClient().get_registered_model(name)  # this takes seconds, so it is done before both begin
print("ready", flush=True)
sys.stdin.readline()
try:
    promote(name, int(version), Decision(True, ["stronger"]), against=int(against))
    print("won")
except RegistryError as error:
    print(error)
"""


def compete(name: str, champion: int, challengers: tuple[int, int]) -> list[str]:
    "Promote two versions at the same time, each in a separate process, and return what each prints"
    command = [sys.executable, "-c", PROMOTE, mlflow.get_tracking_uri(), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rivals = [subprocess.Popen([*command, str(n), str(champion)], **pipes) for n in challengers]
    for rival in rivals:
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        rival.stdin.write("go\n")
        rival.stdin.flush()
    return [rival.communicate(timeout=60)[0].strip() for rival in rivals]


def test_one_of_two_simultaneous_promotions_wins_and_the_other_is_told(contest):
    name, (one, two, three) = contest
    promote(name, one, Decision(True, ["first"]))
    said = compete(name, one, (two, three))
    winner = (two, three)[said.index("won")]
    assert champion(name).version == winner
    (told,) = [words for words in said if words != "won"]
    assert f"was compared with version {one}, but version {winner} is champion by now" in told


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    "A separate temporary folder for this process and those that it starts"
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # Python reads the variable only while this is None
    return folder


def test_promotions_leave_no_file_behind(contest, store, temporary):
    name, (one, two, three) = contest
    before = sorted(store.folder.rglob("*"))
    promote(name, one, Decision(True, ["first"]))
    promote(name, two, Decision(False, ["too weak"]), against=one)
    promote_by_hand(name, two, "to see what happens")
    assert rollback(name, "seen enough").version == one
    assert "won" in compete(name, one, (two, three))
    assert tempfile.gettempdir() == str(temporary)
    assert list(temporary.iterdir()) == []
    assert sorted(store.folder.rglob("*")) == before


def test_locking_a_store_on_a_server_leaves_no_file_either(temporary, monkeypatch):
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: "http://mlflow:5000")
    order = []

    def second():
        with _exclusive():
            order.append("second")

    waiting = threading.Thread(target=second)
    with _exclusive():
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert list(temporary.iterdir()) == []


def test_what_promotion_writes(contest):
    name, (one, two, three) = contest
    assert [v.aliases for v in versions(name)] == [("challenger",), (), ()]
    promote(name, three, Decision(True, ["no champion yet"]))
    assert get_version(name, three).aliases == ("champion",)
    promote(name, two, Decision(False, ["too weak"]), against=three)
    assert champion(name).version == three
    assert get_version(name, two).tags["promotion"] == "refused"
    assert get_version(name, two).tags["promotion.against"] == str(three)
    assert get_version(name, three).tags["challenged.by"] == str(two)
    promote(name, one, Decision(True, ["stronger"]), against=three)
    assert get_version(name, three).tags["replaced.by"] == str(one)
    assert get_version(name, three).tags["replaced.why"] == "stronger"
    with pytest.raises(RegistryError, match="compared with version 3, but version 1 is champion by now"):
        promote(name, two, Decision(True, ["late"]), against=three)
    assert history(name)["promotion"].tolist() == ["promoted", "refused", "promoted"]


def test_a_retried_step_changes_nothing(contest, parcels):
    name, (one, *_) = contest
    uri = MlflowClient().get_model_version(name, str(one)).source
    assert register(uri, name) == one
    decision = Decision(True, ["stronger"])
    assert [promote(name, one, decision, against=None) for _ in range(2)] == [True, True]
    assert len(versions(name)) == 3
    assert get_version(name, one).aliases == ("champion",)
    assert "replaced.by" not in get_version(name, one).tags


def test_a_model_that_nobody_registered():
    assert champion("nobody") is None
    assert versions("nobody") == []
    assert history("nobody").empty
    with pytest.raises(RegistryError, match="no model 'nobody' in the registry"):
        load_model("nobody")


@pytest.mark.parametrize("module", ["storage", "registry", "promotion"])
def test_importing_a_module_imports_nothing_heavy(module):
    heavy = "mlflow sklearn skops pandas"
    code = f"import sys, mlpkg.models.{module}; print([m for m in {heavy.split()} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"  # noqa: S603
