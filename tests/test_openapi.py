"""The description of the API, as tools read it: validators, and a generator of clients whose code then calls a server.

A page cannot show this: the generator needs an environment of its own, and its client a real port.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import mlflow
import pandas as pd
import pandera.pandas as pa
import pytest
import schemathesis.openapi
from conftest import listening
from fastapi.testclient import TestClient
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from mlpkg.data.inputs import inputs_from
from mlpkg.models.oversight import promote_by_hand
from mlpkg.models.registry import register
from mlpkg.models.storage import log_model
from mlpkg.models.tasks import Interval, infer_task
from mlpkg.models.training import fit
from mlpkg.serving.app import create_app
from mlpkg.serving.http import new_key
from mlpkg.settings import Settings
from mlpkg.testing import TemporaryStore, add_version, parcels, parcels_contract, temporary_store

GENERATOR = "openapi-python-client==0.29.1"
KEY, DIGEST = new_key()


def add_price() -> None:
    "A model of numbers with an interval, a time among its columns, and a name that is no name in Python"
    table = parcels(300)
    table["price"] = 5 + table["distance"] / 40
    table["sent"] = pd.date_range("2026-01-01", periods=len(table), freq="h")
    contract = parcels_contract().add_columns({"sent": pa.Column("datetime64[ns]", description="When it was sent")})
    task = replace(infer_task(table["price"], "price"), interval=Interval(0.9, (1.5,), 100))
    columns = ["distance", "sent", "carrier"]
    pipeline = fit("ridge", table, "price", ["distance", "sent"], ["carrier"], task=task)
    inputs = inputs_from(contract, table, columns)
    register(log_model(pipeline, table[columns], inputs=inputs, task=task), "price-v2")
    promote_by_hand("price-v2", 1, "the first")


@pytest.fixture(scope="module")
def store() -> Iterator[TemporaryStore]:
    values = {"serving.model": "parcels", "serving.models": "price-v2", "serving.poll_seconds": 3600}
    with temporary_store(values) as made:
        (made.folder / "lake").mkdir()
        add_version("hist_gradient_boosting", promoted=True)
        add_price()
        mlflow.end_run()
        yield made


def settings(store: TemporaryStore, **serving: object) -> Settings:
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # only the settings decide
    found = store.settings
    return found.model_copy(update={"serving": found.serving.model_copy(update=serving)})


@pytest.fixture(scope="module")
def api(store) -> Iterator[TestClient]:
    app = create_app(settings(store, keys={"shop": DIGEST}, rate="1000/minute"))
    headers = {"X-API-Key": KEY}
    with TestClient(app, "http://localhost", client=("127.0.0.1", 1), headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def document(api) -> dict[str, Any]:
    return api.get("/openapi.json").json()


@pytest.fixture(scope="module")
def without_model(store) -> dict[str, Any]:
    "The description of a server that has no model yet"
    return create_app(settings(store, model="nobody", models=[])).openapi()


@pytest.fixture(params=["document", "without_model"])
def each(request) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def parts_of(part: Any) -> Iterator[dict[str, Any]]:
    "All objects of a document"
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from parts_of(inner)


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    "The operations of a document by method and path"
    return {f"{how} {path}": one for path, ways in document["paths"].items() for how, one in ways.items()}


def resolver(document: dict[str, Any]):
    "Looks up the references of a document"
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    return Registry().with_resource("urn:api", resource).resolver("urn:api")


def test_it_is_an_openapi_document(each):
    schemathesis.openapi.from_dict(each).validate()  # against the schema of OpenAPI 3.1
    for schema in each["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere(each):
    looked = resolver(each)
    found = {part["$ref"] for part in parts_of(each) if "$ref" in part}
    assert "#/components/schemas/Problem" in found
    for ref in found:
        assert looked.lookup(ref).contents


def test_every_schema_has_a_name_that_openapi_allows(each):
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]+", name) for name in each["components"]["schemas"])


def test_every_operation_has_a_name_of_its_own(each):
    names = [one["operationId"] for one in operations(each).values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][\w-]*", name) for name in names), names
    assert all(one["tags"] and one["summary"] == one["summary"].strip() for one in operations(each).values())


def test_each_body_has_an_example_that_the_server_takes(document, api):
    bodies = {name: one["requestBody"] for name, one in operations(document).items() if "requestBody" in one}
    assert len(bodies) == 6  # predict and feedback: of the default model, and of each model by its name
    for name, described in bodies.items():
        schema = document | described["content"]["application/json"]["schema"]
        (example,) = resolver(document).lookup(schema["$ref"]).contents["examples"]
        jsonschema.Draft202012Validator(schema).validate(example)
        answer = api.post(name.removeprefix("post "), json=example)
        assert answer.status_code == 200, answer.text


def test_the_headers_of_answers_are_described(document, store):
    def described(name: str, status: int) -> dict[str, Any]:
        "The headers that an answer may have"
        found = operations(document)[name]["responses"][str(status)]["headers"]
        return {header.lower(): resolver(document).lookup(one["$ref"]).contents for header, one in found.items()}

    plain = {"connection", "content-length", "content-type"}
    limited = create_app(settings(store, keys={"shop": DIGEST}, rate="3/minute", max_bytes=100))
    with TestClient(limited, "http://localhost", client=("127.0.0.1", 1)) as api:
        key = {"X-API-Key": KEY}
        answers = [
            api.post("/v1/predict", json={}),
            api.post("/v1/predict", json={}, headers=key),
            api.post("/v1/predict", content="x" * 200, headers=key),
            api.post("/v1/predict", json={}, headers=key),
            api.post("/v1/predict", json={}, headers=key),
        ]
        assert [one.status_code for one in answers] == [401, 422, 413, 422, 429]
        for answer in answers:
            there = described("post /v1/predict", answer.status_code)
            assert answer.headers.keys() - plain <= there.keys()
            assert {name for name, one in there.items() if one.get("required")} <= answer.headers.keys()
        assert "retry-after" in described("post /v1/predict", 503)
        for name, operation in operations(document).items():
            for status in operation["responses"]:
                assert "x-request-id" in described(name, int(status)), f"{name} {status}"


CALLS = """
import sys
from parcels_predictions_client import AuthenticatedClient
from parcels_predictions_client.api.operations import readyz
from parcels_predictions_client.api.predictions import feedback, model, predict, predict_price_v2
from parcels_predictions_client.models import Problem, Record, Request, Truth, Truths

url, key = sys.argv[1:]
client = AuthenticatedClient(url, token=key, prefix="", auth_header_name="X-API-Key")
record = Record(distance=812.5, weight=None, carrier="red", depot="depot 01")
answer = predict.sync(client=client, body=Request(records=[record, record]))
assert answer.model_version == 1 and len(answer.predictions) == 2, answer
assert 0 <= answer.predictions[0].probability <= 1
truths = Truths(truths=[Truth(request_id=answer.request_id, record=0, truth=1)])
assert feedback.sync(client=client, body=truths).unknown == [], "the answer has been stored"
assert model.sync(client=client).model == "parcels" and readyz.sync(client=client).ready

wrong = predict.sync_detailed(client=client, body=Request(records=[]))
assert wrong.status_code == 422 and isinstance(wrong.parsed, Problem), wrong
assert wrong.parsed.errors[0].field == "records" and wrong.headers["x-request-id"] == wrong.parsed.request_id

from parcels_predictions_client.models import RecordPriceV2, RequestPriceV2
priced = RecordPriceV2.from_dict({"distance": 100.0, "sent": "2026-01-05T10:00:00Z", "carrier": "blue"})
(price,) = predict_price_v2.sync(client=client, body=RequestPriceV2(records=[priced])).predictions
assert price.low < price.prediction < price.high, price
"""


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> str:
    "Python of an environment with the generator, and with what its clients need"
    home = tmp_path_factory.mktemp("generator")
    python = str(home / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, home], check=True)
    got = subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", python, GENERATOR], capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"{GENERATOR} cannot be installed here: {got.stderr.strip()[-500:]}")
    return python


def test_a_generated_client_calls_the_api(generator, document, store, tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "calls.py").write_text(CALLS)
    (tmp_path / "how.yml").write_text("post_hooks: []")  # they would tidy the code up
    made = subprocess.run(
        [generator, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none",
         "--config", "how.yml", "--output-path", "parcels_predictions_client", "--fail-on-warning"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    with listening(settings(store, keys={"shop": DIGEST})) as port:
        url = f"http://127.0.0.1:{port}"
        called = subprocess.run(
            [generator, "calls.py", url, KEY], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
    assert called.returncode == 0, called.stderr
