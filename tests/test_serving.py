"""The API as its users meet it: requests that are wrong, models that come and go, and load on a real server."""

import http.client
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import nbformat
import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest
import schemathesis.config
import schemathesis.engine
import yaml
from conftest import Project, free_port, listening, wait_for
from fastapi.testclient import TestClient
from filelock import FileLock
from pydantic import ValidationError
from schemathesis.engine import events

from mlpkg.batch.predict import score
from mlpkg.data.inputs import inputs_from
from mlpkg.data.lake import open_lake
from mlpkg.models.oversight import promote_by_hand
from mlpkg.models.registry import load_model, register
from mlpkg.models.scoring import probability, records_frame
from mlpkg.models.storage import log_model
from mlpkg.models.tasks import yes_no
from mlpkg.models.training import fit
from mlpkg.serving.app import check_host, create_app
from mlpkg.serving.arms import read_arms
from mlpkg.serving.comparison import compare_arms
from mlpkg.serving.copies import last_good_copy
from mlpkg.serving.http import new_key
from mlpkg.serving.loader import ServedModel, ServingError, prepare_model
from mlpkg.settings import Settings, load_settings
from mlpkg.testing import temporary_store

COLUMNS = ["distance", "weight", "carrier", "zone"]
CONTRACT = pa.DataFrameSchema(
    {
        "distance": pa.Column(float, pa.Check.in_range(0, 1000), description="Distance to travel, km"),
        "weight": pa.Column(float, pa.Check.ge(0), nullable=True, description="Weight, kg"),
        "carrier": pa.Column(str, nullable=True, description="Who brings it"),
        "zone": pa.Column(str, pa.Check.isin(["E", "W"]), description="Part of town"),
    }
)
GOOD = {"distance": 812.5, "weight": 2.25, "carrier": "red", "zone": "E"}


def parcels() -> pd.DataFrame:
    "Rows to train on"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"distance": rng.uniform(5, 900, 1500), "weight": rng.uniform(0, 20, 1500)})
    frame["carrier"], frame["zone"] = rng.choice(["blue", "green", "red"], 1500), rng.choice(["E", "W"], 1500)
    risk = 2 - frame.distance / 400 - 1.5 * (frame.carrier == "red")
    return frame.assign(late=rng.uniform(size=1500) < 1 / (1 + np.exp(risk)))


def add(kind: str, columns: list[str] = COLUMNS, contract: pa.DataFrameSchema = CONTRACT) -> None:
    "Register another version: it becomes challenger"
    rows = parcels()
    numbers = [name for name in columns if name in ("distance", "weight")]
    model = fit(kind, rows, "late", numbers, [name for name in columns if name not in numbers])
    register(log_model(model, rows[columns], inputs=inputs_from(contract, rows, columns)), "parcels")


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    "A store with two versions and no champion: each test works on a copy of its database"
    with temporary_store() as store:
        add("hist_gradient_boosting")
        add("logistic_regression")
        mlflow.end_run()
        yield store.folder


@pytest.fixture
def store(base, tmp_path) -> Path:
    "A separate store for each test, with version 1 as champion"
    shutil.copy(base / "mlflow.db", tmp_path / "mlflow.db")
    (tmp_path / "lake").mkdir()
    point_to(tmp_path)
    promote_by_hand("parcels", 1, "the first")
    return tmp_path


def point_to(folder: Path) -> None:
    "Use a folder's MLflow and lake, until the fixture `base` restores the environment"
    os.environ["MLPKG_LAKE__ROOT"] = str(folder / "lake")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{folder}/mlflow.db")
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # only the settings decide


def settings(folder: Path, **serving: object) -> Settings:
    "Settings of a server; nothing is polled during a test unless it says so"
    keys = {"model": "parcels", "folder": folder / "serving", "poll_seconds": 3600, "log_seconds": 0.2, **serving}
    env = {f"MLPKG_SERVING__{name.upper()}": str(value) for name, value in keys.items()}
    env |= {"MLPKG_LAKE__ROOT": str(folder / "lake"), "MLPKG_TRACKING__URI": f"sqlite:///{folder}/mlflow.db"}
    return load_settings(env=env)


@contextmanager
def serving(folder: Path, client: str = "127.0.0.1", **keys: object) -> Iterator[TestClient]:
    "The application, running"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    app = create_app(settings(folder, **keys))
    with TestClient(app, "http://localhost", client=(client, 1), raise_server_exceptions=False) as api:
        yield api


def refresh(api: TestClient) -> None:
    "Make the loader look now, not at its next poll"
    api.app.state.parts.loader.refresh()


def failing(error: Exception):
    "A function that raises this error, whatever it is given"

    def fail(*args: object, **more: object) -> None:
        raise error

    return fail


def score_with(model: ServedModel, score: Callable) -> None:
    "Let a model predict with another function"
    object.__setattr__(model, "scorer", SimpleNamespace(records=score))


def ask(api: TestClient, *records: object, **more: object):
    return api.post("/v1/predict", json={"records": list(records), **more})


def problem(answer, status: int) -> dict:
    "Check that an error has the form of all errors, and return its content"
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status and found["detail"] and found["type"].startswith("urn:mlpkg:problem:")
    assert found["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return found


@pytest.fixture
def api(store) -> Iterator[TestClient]:
    with serving(store, max_records=5) as api:
        yield api


def body(*records: str) -> str:
    return f'{{"records": [{", ".join(records)}]}}'


def record(**changed: str) -> str:
    "A record as JSON text, so that it may be wrong in any way"
    fields = {name: json.dumps(value) for name, value in GOOD.items()} | changed
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items() if value) + "}"


WRONG = {
    "missing": (body(record(weight="")), "records[0].weight", "missing; use null"),
    "missing and required": (body(record(zone="")), "records[0].zone", "missing"),
    "extra": (body(record(colour='"red"')), "records[0].colour", "no such field (known: distance"),
    "misspelt": (body(record(distanse="1")), "records[0].distanse", "did you mean 'distance'?"),
    "text for a number": (body(record(), record(distance='"12"')), "records[1].distance", "valid number"),
    "a boolean for a number": (body(record(distance="true")), "records[0].distance", "valid number"),
    "number for a text": (body(record(carrier="5")), "records[0].carrier", "valid string"),
    "list for a number": (body(record(distance="[1]")), "records[0].distance", "valid number"),
    "too small": (body(record(distance="-0.5")), "records[0].distance", "greater than or equal to 0"),
    "too large": (body(record(distance="1000.5")), "records[0].distance", "less than or equal to 1000"),
    "not a number": (body(record(weight="NaN")), "records[0].weight", "use null"),
    "infinite": (body(record(distance="-Infinity")), "records[0].distance", "not allowed"),
    "beyond floats": (body(record(weight="1e999")), "records[0].weight", "not allowed"),
    "beyond integers": (body(record(weight="1" + "0" * 400)), "records[0].weight", "not allowed"),
    "null where it must not be": (body(record(distance="null")), "records[0].distance", "valid number"),
    "unknown category": (body(record(zone='"N"')), "records[0].zone", "'E' or 'W'"),
    "empty list": (body(), "records", "at least 1"),
    "too many": (body(*[record()] * 6), "records", "at most 5"),
    "not a list": ('{"records": {}}', "records", "valid array"),
    "no records": ("{}", "records", "missing"),
    "not an object": ("[]", "", "an object"),
    "a record that is not an object": (body("1"), "records[0]", "an object"),
    "unknown beside records": ('{"records": [], "recrods": []}', "recrods", "no such field"),
    "a key that is not text": (f'{{"records": [{record()}], "key": 5}}', "key", "valid string"),
}


@pytest.fixture(scope="module")
def shared(base, tmp_path_factory) -> Iterator[TestClient]:
    "A server for tests that change nothing"
    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(base / "mlflow.db", folder / "mlflow.db")
    point_to(folder)
    promote_by_hand("parcels", 1, "the first")
    with serving(folder, max_records=5) as api:
        yield api


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(shared, case):
    sent, field, words = WRONG[case]
    found = problem(shared.post("/v1/predict", content=sent, headers=JSON), 422)
    assert [error for error in found["errors"] if error["field"] == field and words in error["message"]], found


WIDE = {f"field {n}": 1 for n in range(40_000)}
LARGE = {
    "a wide record": ({"records": [WIDE]}, "records[0]", "40,000 fields"),
    "a wide body": ({"records": [GOOD], **WIDE}, "", "40,001 fields"),
    "many unknown fields": ({"records": [GOOD | dict.fromkeys("abcdefgh", 1)] * 5}, "records[0].a", "no such field"),
    "a long name": ({"records": [GOOD | {"x" * 900_000: 1}]}, f"records[0].{'x' * 100}...", "no such field"),
    "a long text": ({"records": [GOOD], "key": "x" * 900_000}, "key", "at most 200 characters"),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_requests_that_are_wrong_get_short_answers(shared, case):
    sent, field, words = LARGE[case]
    answer = shared.post("/v1/predict", json=sent)
    found = problem(answer, 422)["errors"]
    assert [one for one in found if one["field"] == field and words in one["message"]], found
    assert len(found) <= 50 and len(answer.content) < 15_000


def test_the_check_of_a_request_ends_with_the_first_wrong_record(shared):
    "Making an error takes microseconds, so that a hundred thousand of them would hold up all other requests"
    request = shared.app.state.parts.loader.arms.champion.request
    with pytest.raises(ValidationError) as raised:
        request.validate_python({"records": [GOOD, *[dict.fromkeys("abcdefgh", 1)] * 4]})
    assert {error["loc"][:2] for error in raised.value.errors()} == {("records", 1)}
    found = problem(ask(shared, GOOD, *[{"distance": 1.0, "weight": 1.0, "carrier": "red"}] * 3), 422)
    assert [one["field"] for one in found["errors"]] == [f"records[{place}].zone" for place in (1, 2, 3)]
    assert found["detail"] == "3 things are wrong with the request"


@pytest.mark.parametrize("sent", ["", "{", "[1,", '{"records": [\xff]}', "[" * 100_000, "nan(", '"\\ud800"'])
def test_malformed_json(shared, sent):
    assert "JSON" in problem(shared.post("/v1/predict", content=sent.encode("latin-1"), headers=JSON), 400)["detail"]


def test_wrong_content_types_paths_and_methods(shared):
    problem(shared.post("/v1/predict", content=body(record()), headers={"content-type": "text/plain"}), 415)
    problem(shared.post("/v1/predict", content=body(record())), 415)
    problem(shared.get("/v1/nothing"), 404)
    assert shared.get("/v1/predict").headers["allow"] == "POST"
    problem(shared.get("/v1/predict"), 405)


def test_a_good_request(shared):
    answer = ask(shared, GOOD, GOOD | {"weight": None, "distance": 3}, key="me").json()
    assert answer["model"] == "parcels" and answer["model_version"] == 1
    assert [list(one) for one in answer["predictions"]] == [["prediction", "probability"]] * 2


def test_an_unknown_category_counts_as_missing_where_the_contract_is_open(shared):
    pink, none = (ask(shared, GOOD | {"carrier": carrier}).json()["predictions"] for carrier in ("pink", None))
    assert pink == none != ask(shared, GOOD).json()["predictions"]


def test_the_openapi_document_describes_the_model(shared):
    schemas = shared.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["Record"]["properties"]
    assert (fields["distance"]["minimum"], fields["distance"]["maximum"]) == (0, 1000)
    assert fields["zone"]["enum"] == ["E", "W"] and "km" in fields["distance"]["description"]
    assert schemas["Request"]["properties"]["records"]["maxItems"] == 5
    assert fields["carrier"]["examples"] and "blue, green, red" in fields["carrier"]["description"]
    assert shared.get("/docs").status_code == 200


def test_cors_is_off_unless_it_is_configured(shared, store):
    origin = {"origin": "https://shop.example"}
    assert "access-control-allow-origin" not in shared.get("/healthz", headers=origin).headers
    with serving(store, cors="https://shop.example") as api:
        assert api.get("/healthz", headers=origin).headers["access-control-allow-origin"] == "https://shop.example"
        wanted = origin | {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
        assert api.options("/v1/predict", headers=wanted).status_code == 200
        other = api.get("/healthz", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


# Access


def test_without_keys_the_server_answers_this_machine_only(store):
    with serving(store, client="192.0.2.7") as api:
        for path in ("/v1/model", "/docs", "/metrics", "/readyz"):
            assert "mlpkg key" in problem(api.get(path), 403)["detail"]
    with serving(store) as api:
        problem(api.get("/v1/model", headers={"host": "evil.example:8000"}), 403)
    with pytest.raises(ValueError, match="mlpkg key NAME"):
        check_host(settings(store), "0.0.0.0")


def test_keys(store):
    (key, digest), (other, _) = new_key(), new_key()
    keys = f"shop: {digest}"
    check_host(settings(store, keys=keys), "0.0.0.0")
    with serving(store, client="192.0.2.7", keys=keys) as api:
        for headers in ({}, {"x-api-key": other}, {"x-api-key": digest}, {"x-api-key": ""}):
            found = problem(api.post("/v1/predict", json={"records": [GOOD]}, headers=headers), 401)
            assert "X-API-Key" in found["detail"]
        mine = {"x-api-key": key}
        assert api.post("/v1/predict", json={"records": [GOOD]}, headers=mine).status_code == 200
        schema = api.get("/openapi.json", headers=mine).json()
        assert schema["paths"]["/v1/predict"]["post"]["security"] == [{"key": []}]
        assert schema["paths"]["/metrics"]["get"]["security"] == [{"key": []}]
    assert set(open_lake(settings(store)).read("served/parcels")["key"]) == {"shop"}


def test_where_there_are_keys_only_probes_are_open_unless_settings_say_more(store):
    key, digest = new_key()
    closed = ("/metrics", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css", "/nothing")
    with serving(store, client="192.0.2.7", keys=f"shop: {digest}", rate="20/minute") as api:
        assert [api.get(path).status_code for path in closed] == [401] * 5
        assert [api.get(path, headers={"x-api-key": key}).status_code for path in closed] == [200] * 4 + [404]
        assert {api.get("/readyz").status_code for _ in range(30)} == {200}, "probes are not counted"
        assert 429 in {api.get("/metrics").status_code for _ in range(30)}
    with serving(store, client="192.0.2.7", keys=f"shop: {digest}", open="metrics, docs") as api:
        assert [api.get(path).status_code for path in closed] == [200] * 4 + [404]
        assert api.get("/v1/model").status_code == 401
        assert "security" not in api.get("/openapi.json").json()["paths"]["/metrics"]["get"]


def test_prometheus_reads_the_figures_as_the_production_page_says(store):
    page = Path(__file__).parents[1] / "nbs" / "how-to" / "production.ipynb"
    text = "".join(cell.source for cell in nbformat.read(page, as_version=4).cells)
    (job,) = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["scrape_configs"]
    key, digest = new_key()
    assert set(job["http_headers"]["X-API-Key"]) == {"files"}, "the key itself is not in the configuration"
    with serving(store, client="192.0.2.7", keys=f"prometheus: {digest}") as api:
        assert api.get(job["metrics_path"]).status_code == 401
        found = api.get(job["metrics_path"], headers=dict.fromkeys(job["http_headers"], key))
        assert found.status_code == 200 and "mlpkg_requests_total" in found.text


def test_readiness_tells_details_only_to_those_who_have_a_key(store, monkeypatch):
    key, digest = new_key()
    with serving(store, keys=f"shop: {digest}") as api:
        monkeypatch.setattr("mlpkg.serving.loader.client", failing(OSError(f"no such file: {store}/mlflow.db")))
        refresh(api)
        told, whole = api.get("/readyz"), api.get("/readyz", headers={"x-api-key": key})
        assert str(store) in whole.text and str(store) not in told.text
        assert [one["about"] for one in told.json()["problems"]] == ["mlflow"]
        assert str(store) not in api.get("/readyz", headers={"x-api-key": "a guess"}).text


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"])
def test_without_keys_a_request_that_came_through_a_proxy_is_refused(shared, header):
    assert "mlpkg key" in problem(shared.get("/v1/model", headers={header: "192.0.2.7"}), 403)["detail"]


def test_without_keys_a_server_says_what_its_access_rests_on(store, caplog):
    check_host(settings(store), "127.0.0.1")
    assert "A proxy on it" in caplog.text and "serving.keys" in caplog.text
    caplog.clear()
    check_host(settings(store, keys=f"shop: {new_key()[1]}"), "127.0.0.1")
    assert not caplog.text


def test_settings_that_a_server_cannot_work_with(store):
    for keys, words in [({"keys": "shop: secret"}, "mlpkg key shop"), ({"rate": "often"}, "100/second")]:
        with pytest.raises(ValueError, match=words):
            create_app(settings(store, **keys))
    with pytest.raises(ValueError, match="serving.model"):
        create_app(settings(store, model=""))


def test_rate_limit(store):
    (key, digest), (other, second) = new_key(), new_key()
    with serving(store, keys=f"shop: {digest}, app: {second}", rate="3/minute") as api:
        codes = [api.get("/v1/model", headers={"x-api-key": key}).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        answer = api.get("/v1/model", headers={"x-api-key": key})
        assert "from shop" in problem(answer, 429)["detail"] and 1 <= int(answer.headers["retry-after"]) <= 61
        assert api.get("/v1/model", headers={"x-api-key": other}).status_code == 200
        assert [api.get("/v1/model").status_code for _ in range(4)] == [401, 401, 401, 429]
        assert api.get("/healthz").status_code == 200


# Errors inside


def test_clients_see_no_details_of_an_internal_error(api, monkeypatch, caplog):
    def fail(records):
        raise RuntimeError("secret detail")

    score_with(api.app.state.parts.loader.arms.champion, fail)
    answer = ask(api, GOOD)
    found = problem(answer, 500)
    assert "secret" not in answer.text and found["request_id"] in caplog.text and "secret detail" in caplog.text


def test_a_request_that_fails_does_not_affect_others_in_its_batch(api):
    parts = api.app.state.parts
    champion = parts.loader.arms.champion
    score, entered, go_on = champion.scorer.records, threading.Event(), threading.Event()

    def slow(records):
        entered.set()
        go_on.wait(10)
        if any(one["distance"] == 13 for one in records):
            raise RuntimeError("thirteen")
        return score(records)

    score_with(champion, slow)
    asked, codes = [1, 2, 13, 4], {}

    def one(distance):
        codes[distance] = ask(api, GOOD | {"distance": distance}).status_code

    threads = [threading.Thread(target=one, args=(distance,)) for distance in asked]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(parts.batcher.waiting) == 3, 10, "the others to wait")
    go_on.set()
    for thread in threads:
        thread.join()
    assert codes == {1: 200, 2: 200, 13: 500, 4: 200}


def test_more_requests_than_may_wait(store):
    with serving(store, max_waiting=2) as api:
        parts = api.app.state.parts
        champion, go_on, entered = parts.loader.arms.champion, threading.Event(), threading.Event()
        score = champion.scorer.records
        score_with(champion, lambda records: (entered.set(), go_on.wait(10), score(records))[2])
        codes: list[int] = []
        threads = [threading.Thread(target=lambda: codes.append(ask(api, GOOD).status_code)) for _ in range(3)]
        threads[0].start()
        assert entered.wait(10)
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: len(parts.batcher.waiting) == 2, 10, "two requests to wait")
        answer = ask(api, GOOD)
        assert problem(answer, 503)["type"].endswith("overloaded") and answer.headers["retry-after"] == "1"
        go_on.set()
        for thread in threads:
            thread.join()
        assert codes == [200] * 3


class Gate:
    "Lets a model predict when it is opened, and notes what it was asked"

    def __init__(self, model: ServedModel):
        self.entered, self.opened, self.asked = threading.Event(), threading.Event(), []
        self.score = model.scorer.records
        score_with(model, self)

    def __call__(self, records):
        self.asked += [one["distance"] for one in records]
        self.entered.set()
        assert self.opened.wait(30)
        return self.score(records)


def test_more_records_than_may_wait(store):
    with serving(store, max_waiting_records=5) as api:
        parts = api.app.state.parts
        gate, codes = Gate(parts.loader.arms.champion), []
        threads = [threading.Thread(target=lambda n=n: codes.append(ask(api, *[GOOD] * n).status_code)) for n in (1, 4)]
        threads[0].start()
        assert gate.entered.wait(10)
        threads[1].start()
        wait_for(lambda: parts.batcher.records == 4, 10, "four records to wait")
        answer = ask(api, GOOD, GOOD)
        assert problem(answer, 503)["type"].endswith("overloaded") and answer.headers["retry-after"] == "1"
        assert "1 requests with 4 records" in answer.json()["detail"]
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert codes == [200] * 2
        assert ask(api, *[GOOD] * 9).status_code == 200, "a request that need not wait may be larger"


def test_a_model_that_hangs_is_reported_and_its_requests_are_sent_away(store):
    with serving(store, answer_timeout=0.5) as api:
        gate = Gate(api.app.state.parts.loader.arms.champion)
        for _ in range(2):  # the one that hangs, and one that waits for its turn
            answer = ask(api, GOOD)
            assert "within 0.5 s" in problem(answer, 503)["detail"] and answer.headers["retry-after"]
        ready = api.get("/readyz")
        assert ready.status_code == 503 and not ready.json()["ready"]
        assert "has not come back from a call" in ready.json()["problems"][0]["words"]
        assert api.get("/healthz").status_code == 200
        gate.opened.set()
        wait_for(lambda: api.get("/readyz").status_code == 200, 10, "the model to come back")
        assert ask(api, GOOD).status_code == 200
        assert len(gate.asked) == 2, "the request that was sent away is not predicted any more"


# The same figures everywhere


def some_records() -> list[dict]:
    rows = parcels()[COLUMNS].head(300).astype(object)
    rows.loc[::7, "carrier"], rows.loc[::5, "weight"], rows.loc[::11, "carrier"] = None, None, "pink"
    return rows.to_dict("records")


@pytest.mark.parametrize("version", [1, 2])
def test_the_api_predicts_what_a_notebook_predicts(store, version):
    if version == 2:
        promote_by_hand("parcels", 2, "to compare")
    records, loaded = some_records(), load_model("parcels")
    with serving(store) as api:
        answer = ask(api, *records).json()
        alone = [ask(api, one).json()["predictions"][0]["probability"] for one in records[:20]]
        assert api.app.state.parts.loader.arms.champion.scorer.fast
    said = np.array([one["probability"] for one in answer["predictions"]])
    assert answer["model_version"] == version
    frame = records_frame(records, loaded.inputs)
    assert np.array_equal(said, probability(loaded.pipeline, frame))  # as in a notebook
    assert alone == [probability(loaded.pipeline, frame.iloc[[place]])[0] for place in range(20)]
    assert np.allclose(alone, said[:20], rtol=1e-12, atol=0)
    assert [one["prediction"] for one in answer["predictions"]] == (said >= 0.5).astype(int).tolist()


def test_the_api_predicts_what_a_batch_predicts(store):
    rows = pd.DataFrame(some_records()).assign(number=range(300), month="2026-01")
    lake = open_lake(settings(store))
    lake.write("clean/parcels", rows, partition_by=["month"])
    score(lake, load_model("parcels"), "clean/parcels", "predictions/parcels", {"month": "2026-01"}, keep=["number"])
    batch = lake.read("predictions/parcels").sort_values("number")
    with serving(store) as api:
        online = pd.DataFrame(ask(api, *some_records()).json()["predictions"])
    assert len(batch) == 300
    assert batch["probability"].tolist() == online["probability"].tolist()
    assert batch["prediction"].tolist() == online["prediction"].tolist()


def test_everybody_uses_the_threshold_of_the_model(store):
    "Champion and challenger have one each, and neither of them is a half"
    for threshold in (0.2, 0.6):
        rows = parcels()
        model = fit("logistic_regression", rows, "late", ["distance", "weight"], ["carrier", "zone"])
        task = replace(yes_no, threshold=threshold)
        with mlflow.start_run():
            inputs = inputs_from(CONTRACT, rows, COLUMNS)
            number = register(log_model(model, rows[COLUMNS], inputs=inputs, task=task), "parcels")
        if threshold == 0.2:
            promote_by_hand("parcels", number, "a miss costs more than a false alarm")
    lake, sent = open_lake(settings(store)), some_records()
    lake.write("clean/parcels", pd.DataFrame(sent).assign(month="2026-01"), partition_by=["month"])
    score(lake, load_model("parcels"), "clean/parcels", "predictions/parcels", {"month": "2026-01"})
    with serving(store, strategy="shadow") as api:
        online = pd.DataFrame(ask(api, *sent).json()["predictions"])
        about = api.get("/openapi.json").json()["components"]["schemas"]["Prediction"]["properties"]["prediction"]
    assert "0.2 or more" in about["description"]
    kept = lake.read("served/parcels").set_index("arm")
    found = {"api": (online, 0.2), "batch": (lake.read("predictions/parcels"), 0.2)}
    found |= {"champion": (kept.loc["champion"], 0.2), "shadow": (kept.loc["shadow"], 0.6)}
    for name, (table, threshold) in found.items():
        assert len(table) == 300 and (table["prediction"] == (table["probability"] >= threshold)).all(), name
        assert (table["prediction"] != (table["probability"] >= 0.5)).any(), name


# Models that come and go


def test_no_champion_yet(base, tmp_path):
    shutil.copy(base / "mlflow.db", tmp_path / "mlflow.db")
    point_to(tmp_path)
    with serving(tmp_path, poll_seconds=0.1) as api:
        for answer in (ask(api, GOOD), api.get("/v1/model")):
            assert "mlpkg promote" in problem(answer, 503)["detail"] and answer.headers["retry-after"]
        assert api.get("/openapi.json").status_code == 200 and api.get("/healthz").status_code == 200
        ready = api.get("/readyz")
        assert ready.status_code == 503 and "no champion" in ready.json()["problems"][0]["words"]
        promote_by_hand("parcels", 1, "at last")
        wait_for(lambda: api.get("/readyz").status_code == 200, 20, "the server to be ready")
        assert ask(api, GOOD).json()["model_version"] == 1
        assert "Record" in api.get("/openapi.json").json()["components"]["schemas"]


def test_a_champion_alias_that_is_deleted_while_serving(api):
    mlflow.MlflowClient().delete_registered_model_alias("parcels", "champion")
    refresh(api)
    assert ask(api, GOOD).json()["model_version"] == 1
    ready = api.get("/readyz").json()
    assert ready["ready"] and "version 1 goes on answering" in ready["problems"][0]["words"]
    assert api.get("/v1/model").json()["alias"] is None
    assert 'mlpkg_problem{about="champion",model="parcels"} 1.0' in api.get("/metrics").text
    promote_by_hand("parcels", 2, "back")
    refresh(api)
    assert ask(api, GOOD).json()["model_version"] == 2 and not api.get("/readyz").json()["problems"]


def test_a_new_model_is_logged_as_info_and_not_as_a_warning(store, caplog):
    caplog.set_level(logging.INFO, "mlpkg.serving.loader")
    with serving(store) as api:
        promote_by_hand("parcels", 2, "the next")
        refresh(api)
    logged = [(one.levelname, one.message) for one in caplog.records if one.name == "mlpkg.serving.loader"]
    assert logged == [("INFO", f"model 'parcels' version {number} answers") for number in (1, 2)]


def test_mlflow_goes_away_and_comes_back(api, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mlpkg.serving.loader.client", failing(ConnectionError("no route")))
        refresh(api)
        refresh(api)
        ready = api.get("/readyz").json()
        assert ready["ready"] and not ready["mlflow"] and "no route" in ready["problems"][0]["words"]
        assert ready["problems"][0]["since"] and ready["mlflow_seen"] < ready["problems"][0]["since"]
        assert 'mlpkg_mlflow_up{model="parcels"} 0.0' in api.get("/metrics").text
        assert ask(api, GOOD).status_code == 200
    refresh(api)
    assert api.get("/readyz").json()["mlflow"] and 'mlpkg_mlflow_up{model="parcels"} 1.0' in api.get("/metrics").text


def test_cold_start_without_mlflow(store, monkeypatch):
    with serving(store) as api:
        before = ask(api, GOOD).json()["predictions"]
    with monkeypatch.context() as patch:
        patch.setattr("mlpkg.serving.loader.client", failing(ConnectionError("no route")))
        with serving(store) as api:
            assert ask(api, GOOD).json()["predictions"] == before
            ready = api.get("/readyz").json()
            assert ready["source"] == "local copy" and not ready["mlflow"]
            patch.undo()
            refresh(api)
            assert api.get("/readyz").json()["source"] == "MLflow"
        patch.setattr("mlpkg.serving.loader.client", failing(ConnectionError("no route")))
        marker = next((store / "serving").rglob("last-good.json"))
        (marker.parent / json.loads(marker.read_text())["folder"] / "model.skops").write_bytes(b"half a file")
        with serving(store) as api:  # a copy that cannot be used is reported and not served
            words = {one["about"]: one["words"] for one in api.get("/readyz").json()["problems"]}
            assert "cannot be used" in words["champion"] and problem(ask(api, GOOD), 503)


def test_a_version_that_cannot_be_loaded(api):
    with mlflow.start_run():
        model = load_model("parcels").pipeline
        info = mlflow.sklearn.log_model(model, name="pickled", serialization_format="cloudpickle", pip_requirements=[])
    client = mlflow.MlflowClient()
    number = client.create_model_version("parcels", info.model_uri, model_id=info.model_id).version
    client.set_registered_model_alias("parcels", "champion", number)
    refresh(api)
    assert ask(api, GOOD).json()["model_version"] == 1
    words = api.get("/readyz").json()["problems"][0]["words"]
    assert f"version {number} cannot be used as champion" in words and "cloudpickle" in words
    assert 'mlpkg_reloads_total{model="parcels",result="failed"} 1.0' in api.get("/metrics").text
    refresh(api)  # not tried again at once
    assert 'mlpkg_reloads_total{model="parcels",result="failed"} 1.0' in api.get("/metrics").text


def test_a_scorer_that_cannot_be_made_is_a_serving_error(store, monkeypatch):
    monkeypatch.setattr("mlpkg.serving.loader.Scorer", failing(ValueError("Negative values in data")))
    with pytest.raises(ServingError, match="model 'parcels' version 1 fails on synthetic records: .*Negative values"):
        prepare_model(load_model("parcels"), most=100)


def test_the_loader_keeps_watching_after_an_error(store, monkeypatch):
    with serving(store, poll_seconds=0.1) as api:
        with monkeypatch.context() as patch:
            patch.setattr(
                "mlpkg.serving.loader.mark_good", lambda *args: (_ for _ in ()).throw(OSError("disk is full"))
            )
            promote_by_hand("parcels", 2, "on a bad day")
            problems = wait_for(lambda: api.get("/readyz").json()["problems"], 20, "the problem to be reported")
            assert "disk is full" in problems[0]["words"] and ask(api, GOOD).json()["model_version"] == 2
        wait_for(lambda: not api.get("/readyz").json()["problems"], 20, "the problem to end")
        assert last_good_copy("parcels", store / "serving").name.startswith("2-")
        promote_by_hand("parcels", 1, "and on")
        wait_for(lambda: api.get("/v1/model").json()["version"] == 1, 20, "version 1 to answer")


def test_a_challenger_that_fails_costs_no_answer_and_is_taken_out(store, monkeypatch):
    with serving(store, strategy="canary", share=1.0) as api:
        loader = api.app.state.parts.loader
        wait_for(lambda: loader.arms.challenger, 20, "the challenger to take part")
        monkeypatch.setattr(loader.arms.challenger.scorer, "records", failing(ZeroDivisionError("of the challenger")))
        found = [ask(api, GOOD) for _ in range(5)]
        assert [(one.status_code, one.json()["model_version"]) for one in found] == [(200, 1)] * 5
        assert loader.arms.challenger is None, "three failures are enough"
        words = {one["about"]: one["words"] for one in api.get("/readyz").json()["problems"]}
        assert "version 2 fails on requests, which the champion answers" in words["challenger"]
        assert "takes no part for 1 min" in words["challenger"]
        assert 'mlpkg_challenger_failed_total{model="parcels"} 3.0' in api.get("/metrics").text
        refresh(api)
        assert loader.arms.challenger is None, "not before its time is over"


@pytest.mark.parametrize(("strategy", "arm"), [("canary", "challenger"), ("shadow", "shadow")])
def test_a_challenger_that_fails_is_noted_in_the_answer_log(store, strategy, arm):
    lake = open_lake(settings(store))
    with serving(store) as api:
        ask(api, GOOD)
    table = lake.read("served/parcels").drop(columns="failed")  # as an earlier version of mlpkg has written it
    lake.write("served/parcels", table, mode="overwrite", change_schema=True)
    with serving(store) as api:
        ask(api, GOOD)
    assert "failed" not in lake.schema("served/parcels").names, "as long as nothing has failed"
    with serving(store, strategy=strategy, share=1.0) as api:
        loader = api.app.state.parts.loader
        wait_for(lambda: loader.arms.challenger, 20, "the challenger to take part")
        ask(api, GOOD)
        wait_for(lambda: f'arm="{arm}"' in api.get("/metrics").text, 20, "the challenger to predict")
        score_with(loader.arms.challenger, failing(ZeroDivisionError("of the challenger")))
        assert ask(api, GOOD, GOOD | {"distance": 3}).json()["model_version"] == 1
    with serving(store) as api:
        ask(api, GOOD)
    rows = lake.read("served/parcels")
    assert rows["failed"].dropna().tolist() == [2, 2] and rows["inputs"].notna().all()
    found = compare_arms(lake, "parcels").set_index("arm")
    assert found.loc[arm, ["n", "failed"]].tolist() == [1, 2]
    assert "failed on 2 records" in found.loc[arm, "words"]


def test_a_challenger_with_other_columns_takes_no_part(store):
    with mlflow.start_run():
        add("hist_gradient_boosting", ["distance", "zone"])
    for strategy in ("shadow", "canary"):
        with serving(store, strategy=strategy, share=1) as api:
            assert ask(api, GOOD).json()["model_version"] == 1
            words = api.get("/readyz").json()["problems"][0]["words"]
            assert "takes no part: it does not take carrier, weight" in words
            assert 'mlpkg_problem{about="challenger",model="parcels"} 1.0' in api.get("/metrics").text


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("distance", pa.Column(float, pa.Check.in_range(0, 900)), "more than 900 for distance"),
        ("weight", pa.Column(float, pa.Check.ge(0)), "a missing value for weight"),
        (
            "carrier",
            pa.Column(str, pa.Check.isin(["blue", "green", "red"]), nullable=True),
            "does not know for carrier",
        ),
    ],
)
def test_a_challenger_with_a_narrower_contract_takes_no_part(store, name, column, words):
    with mlflow.start_run():
        add("logistic_regression", contract=CONTRACT.remove_columns([name]).add_columns({name: column}))
    with serving(store, strategy="shadow") as api:
        assert ask(api, GOOD | {"distance": 950, "weight": None, "carrier": "pink"}).json()["model_version"] == 1
        assert words in api.get("/readyz").json()["problems"][0]["words"]
        assert api.app.state.parts.loader.arms.challenger is None
    assert set(open_lake(settings(store)).read("served/parcels")["arm"]) == {"champion"}


def test_canary(store):
    mlflow.MlflowClient().set_registered_model_alias("parcels", "challenger", "2")
    with serving(store, strategy="canary", share=0.3) as api:
        arms = {str(n): ask(api, GOOD, key=str(n)).json()["model_version"] for n in range(150)}
        assert 25 <= sum(version == 2 for version in arms.values()) <= 65
        assert all(ask(api, GOOD, key=key).json()["model_version"] == arms[key] for key in list(arms)[:40])
        assert {ask(api, GOOD).json()["model_version"] for _ in range(40)} == {1, 2}
        assert 'arm="challenger"' in api.get("/metrics").text
    rows = open_lake(settings(store)).read("served/parcels")
    assert set(zip(rows["arm"], rows["model_version"], strict=True)) == {("champion", 1), ("challenger", 2)}
    assert set(rows["share"]) == {0.3}
    kept = rows[rows["sticky"] != ""]
    assert (kept["model_version"] == kept["sticky"].map(arms)).all()


def test_shadow(store):
    mlflow.MlflowClient().set_registered_model_alias("parcels", "challenger", "2")
    with serving(store, strategy="shadow") as api:
        answers = [ask(api, GOOD, GOOD | {"distance": n}).json() for n in range(10)]
    assert {answer["model_version"] for answer in answers} == {1}
    rows = open_lake(settings(store)).read("served/parcels").set_index(["arm", "request_id", "record"])
    assert rows[["share", "failed"]].isna().all().all()
    rows = rows.drop(columns=["share", "failed"])
    both = rows.loc["champion"].join(rows.loc["shadow"].add_suffix("_shadow"))
    assert len(both) == 20 and both.notna().all().all() and (both["model_version_shadow"] == 2).all()
    frame = records_frame([json.loads(one) for one in both["inputs"]], load_model("parcels", 2).inputs)
    assert np.allclose(both["probability_shadow"], probability(load_model("parcels", 2).pipeline, frame))
    said = {answer["request_id"]: [one["probability"] for one in answer["predictions"]] for answer in answers}
    assert all(said[name][place] == row.probability for (name, place), row in both.iterrows())


def test_clients_do_not_notice_a_shadow_that_fails(store, caplog):
    mlflow.MlflowClient().set_registered_model_alias("parcels", "challenger", "2")
    with serving(store, strategy="shadow") as api:
        score_with(api.app.state.parts.loader.arms.challenger, lambda records: 1 / 0)
        assert ask(api, GOOD).status_code == 200
        lost = 'mlpkg_shadow_lost_total{model="parcels"} 1.0'
        wait_for(lambda: lost in api.get("/metrics").text, 10, "the loss to be counted")
        assert "ZeroDivisionError" in caplog.text


def test_truth(api):
    name = ask(api, GOOD, GOOD).json()["request_id"]

    def give(**truth):
        return api.post("/v1/feedback", json={"truths": [{"request_id": name, "record": 1, "truth": 1} | truth]})

    first = give().json()
    assert first["accepted"] + first["waiting"] == [f"{name}:1"]  # as fast as the answer comes to the lake
    assert give().json()["repeated"] and give(truth=0).json()["corrected"]
    assert give(record=9).json()["waiting"] and give(request_id=f"2020-01-01-{'0' * 32}").json()["unknown"]
    for wrong in ({"truth": 2}, {"truth": True}, {"truth": None}, {"request_id": "x"}, {"record": -1}, {"more": 1}):
        assert problem(give(**wrong), 422)["errors"][0]["field"] == f"truths[0].{next(iter(wrong))}"


def test_truths_that_wait_are_stored_together_and_leave_room_for_predictions(store):
    "Somebody holds the lock: one truth is in its commit, two wait, and others are sent away: a quarter of sixteen"
    with serving(store, max_connections=16) as api, ThreadPoolExecutor(8) as clients:
        names = [ask(api, GOOD).json()["request_id"] for _ in range(5)]
        feedback, queue = api.app.state.parts.feedback, api.app.state.parts.truths

        def give(name: str, truth: int = 1):
            return api.post("/v1/feedback", json={"truths": [{"request_id": name, "record": 0, "truth": truth}]})

        feedback.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(feedback.folder / "feedback.mutex"):
            first = clients.submit(give, names[0])
            wait_for(lambda: queue.busy and not queue.waiting, 10, "the first truth to be in its commit")
            more = [clients.submit(give, names[1]), clients.submit(give, names[0], 0)]
            wait_for(lambda: len(queue.waiting) == 2, 10, "two truths to wait")
            refused = give(names[2])
            assert "2 requests with 2 records are already waiting for the lake" in problem(refused, 503)["detail"]
            assert refused.headers["retry-after"] == "1"
            assert ask(api, GOOD).status_code == 200
        given = [one.result().json() for one in (first, *more)]
        assert [sorted(key for key, value in one.items() if value) for one in given[2:]] == [["corrected"]]
        assert all(one["accepted"] or one["waiting"] for one in given[:2])
        lake = open_lake(settings(store))
        assert lake.count("feedback/parcels") == 3
        assert lake.version("feedback/parcels") == 1, "two commits"


def test_a_request_that_is_sent_again_to_another_server_counts_once(store):
    mlflow.MlflowClient().set_registered_model_alias("parcels", "challenger", "2")
    named = {"Idempotency-Key": "order-17"}
    sent = {"json": {"records": [GOOD, GOOD]}}
    there = settings(store, strategy="shadow")
    elsewhere = there.model_copy(update={"serving": there.serving.model_copy(update={"folder": store / "other"})})
    second = TestClient(create_app(elsewhere), "http://localhost", client=("127.0.0.1", 1))
    with serving(store, strategy="shadow") as one, second as other:
        ids = [api.post("/v1/predict", **sent, headers=named).json()["request_id"] for api in (one, other, one)]
        assert len(set(ids)) == 1, "unless it is midnight (UTC)"
        more = one.post("/v1/predict", **sent, headers={"Idempotency-Key": "order-18"}).json()["request_id"]
        plain = one.post("/v1/predict", **sent)
        assert len({ids[0], more, plain.json()["request_id"]}) == 3
        assert plain.headers["x-request-id"] == plain.json()["request_id"]
        assert problem(one.post("/v1/predict", **sent, headers={"Idempotency-Key": "a b"}), 400)
        truths = [{"request_id": ids[0], "record": place, "truth": 1} for place in (0, 1)]
        given = [api.post("/v1/feedback", json={"truths": truths}).json() for api in (one, other)]
        assert len(given[1]["repeated"]) == 2
    arms = read_arms(open_lake(settings(store)), "parcels")
    assert arms.groupby("arm").size().to_dict() == {"champion": 6, "shadow": 6}
    assert arms.query("arm == 'champion'")["truth"].notna().sum() == 2


# A real server


def stop(process: subprocess.Popen) -> None:
    "Stop a server as an operator would"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in output, output


@pytest.fixture
def server(store) -> Iterator[tuple[Project, int, subprocess.Popen]]:
    "`serve` in a process of its own"
    port = free_port()
    lines = [
        "[local]", "lake.root = lake", "tracking.uri = sqlite:///mlflow.db", "steps.outbox = o", "airflow.home = a",
        "serving.folder = serving", "serving.model = parcels", "serving.poll_seconds = 0.3",
    ]  # fmt: skip
    (store / "settings.ini").write_text("\n".join(lines))
    project = Project(store)
    process = project.start(sys.executable, "-c", f"from mlpkg.serving.app import serve; serve(port={port})")
    try:
        wait_for(lambda: process.poll() is not None or reaches(port), 60, "the server to answer")
        yield project, port, process
        if process.poll() is None:
            stop(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def reaches(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def test_a_promotion_under_load(server):
    project, port, process = server
    records = [GOOD | {"distance": float(n)} for n in range(12)]
    expected = {}
    for number in (1, 2):
        loaded = load_model("parcels", number)
        expected[number] = probability(loaded.pipeline, records_frame(records, loaded.inputs))
    found: list[tuple[int, dict]] = []
    over = threading.Event()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for turn in itertools.count():
            if over.is_set():
                return
            some = records[turn % 3 :]
            connection.request("POST", "/v1/predict", json.dumps({"records": some}), JSON)
            answer = connection.getresponse()
            found.append((answer.status, json.loads(answer.read()) | {"first": turn % 3}))

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in (2, 1, 2):
        time.sleep(1)
        promote_by_hand("parcels", number, "under load")
        wait_for(lambda: found[-1][1].get("model_version") == number, 20, f"version {number} to answer")  # noqa: B023
    over.set()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200} and len(found) > 100
    for _, answer in found:  # every record of an answer by the version that it names
        said = [one["probability"] for one in answer["predictions"]]
        assert np.allclose(said, expected[answer["model_version"]][answer["first"] :], rtol=1e-12, atol=0)
    stop(process)
    kept = open_lake(project.settings).read("served/parcels")
    assert set(kept["request_id"]) == {answer["request_id"] for _, answer in found}


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Content-Length: 100000000"])
def test_a_body_of_100_mb(store, length):
    "It is refused as soon as it is known to be too long, and not read"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with (
        listening(settings(store)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as one,
    ):
        one.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode())
        one.sendall(b"Content-Type: application/json\r\n\r\n")
        sent, answer = 0, b""
        with suppress(OSError):  # the server hangs up
            for _ in range(1600):
                one.sendall(chunk)
                sent += len(chunk)
        with suppress(OSError):
            while more := one.recv(65536):
                answer += more
        assert sent < 50_000_000  # most of it in buffers of the network
        assert answer.startswith(b"HTTP/1.1 413") and b"larger than 1,000,000 bytes" in answer
        assert reaches(port)


def post(port: int, sent: str, *more: str) -> socket.socket:
    "Begin a request on a connection of its own"
    one = socket.create_connection(("127.0.0.1", port), timeout=20)
    lines = ["POST /v1/predict HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more, "", sent]
    one.sendall("\r\n".join(lines).encode())
    return one


def said(one: socket.socket) -> bytes:
    "All that a server says until it closes the connection"
    with one, suppress(ConnectionResetError):
        return b"".join(iter(lambda: one.recv(65536), b""))
    return b""


def test_requests_whose_clients_have_left_are_not_predicted(store, monkeypatch):
    made = []
    monkeypatch.setattr("mlpkg.serving.app.create_app", lambda given: made.append(create_app(given)) or made[0])
    with listening(settings(store)) as port:
        parts = made[0].state.parts
        gate = Gate(parts.loader.arms.champion)
        sent = [body(record(distance=str(n))) for n in (1, 2, 3)]
        ones = [post(port, one, f"Content-Length: {len(one)}", "Connection: close") for one in sent[:1]]
        assert gate.entered.wait(10)
        ones += [post(port, one, f"Content-Length: {len(one)}", "Connection: close") for one in sent[1:]]
        wait_for(lambda: len(parts.batcher.waiting) == 2, 10, "two requests to wait")
        ones.pop(1).close()
        gone = "mlpkg_requests_total", {"route": "/v1/predict", "status": "499"}
        wait_for(lambda: parts.metrics.registry.get_sample_value(*gone), 10, "the server to notice")
        gate.opened.set()
        assert [said(one)[:12] for one in ones] == [b"HTTP/1.1 200"] * 2
    assert gate.asked == [1, 3]
    assert len(open_lake(settings(store)).read("served/parcels")) == 2


def test_a_body_that_does_not_arrive_is_refused(store):
    with listening(settings(store, read_timeout=0.5)) as port:
        answer = said(post(port, '{"records": [', "Content-Length: 100"))
        assert answer.startswith(b"HTTP/1.1 408") and b"within 0.5 s" in answer
        assert reaches(port)


def test_more_connections_than_there_may_be(store):
    with listening(settings(store, max_connections=4)) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        wait_for(lambda: not reaches(port), 10, "the server to be full")
        for one in silent:
            one.close()
        wait_for(lambda: reaches(port), 10, "the server to have room again")


# Whatever the schema allows, and what it does not


@pytest.fixture
def described(store) -> Iterator[schemathesis.BaseSchema]:
    "The description of a server with keys"
    key, digest = new_key()
    config = {"seed": 0, "headers": {"X-API-Key": key}}
    config |= {"generation": {"max-examples": 30, "deterministic": True, "database": "none"}}
    with listening(settings(store, keys=f"shop: {digest}", max_records=20)) as port:
        config = schemathesis.config.SchemathesisConfig.from_dict(config)
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=config)


def test_schemathesis(described):
    failures, checked = [], 0
    for event in schemathesis.engine.from_schema(described).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(f"{type(event).__name__}: {getattr(event, 'value', None) or event.exception}")
        if isinstance(event, events.ScenarioFinished):
            for checks in event.recorder.checks.values():
                checked += len(checks)
                failures += [failed(event.recorder, check) for check in checks if check.failure_info]
    assert not failures, "\n\n".join(failures)
    assert checked > 1000


def failed(recorder, check) -> str:
    "A failed check in words"
    return f"{recorder.label}: {check.name}: {check.failure_info.failure}\n{check.failure_info.code_sample}"
