"""Secrets that are planted in real runs, and looked for in every file, table, message and page that is left behind.

A page cannot show a run under Airflow, a mail server with a certificate, or a search through all files of a project.
"""

import base64
import contextlib
import html
import http.server
import io
import json
import logging
import os
import smtplib
import socketserver
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from pathlib import Path

import nbformat
import pytest
from conftest import answering

from mlpkg.airflow.notify import Message, send
from mlpkg.errors import MlpkgError
from mlpkg.redaction import get_log, redact, redact_structlog
from mlpkg.secrets import secret_values
from mlpkg.settings import NotifySettings
from mlpkg.steps.execution import StepError
from mlpkg.steps.run import run_step

KEY = "-----BEGIN PRIVATE KEY-----\n" + "\n".join(
    base64.b64encode(bytes((7 * line + byte * byte) % 256 for byte in range(48))).decode() for line in range(6)
)
SECRETS = {
    "DB_PASSWORD": "plain-Hunter2xq",
    "SIGNING_SECRET": 'a "quoted" Straße & \\back/slash <x>',
    "DEPLOY_PRIVATE_KEY": KEY + "\n-----END PRIVATE KEY-----\n",
    "AZURE_STORAGE_ACCOUNT_KEY": "q3+Zk/0vHk8dV1mW+Pz6/Rb2c==",
    "MLPKG_NOTIFY__WEBHOOK": "https://chat.example.org/services/T024BE7LD/xoGrKq7A9bWm",
    "ORDERS": "postgresql://ann:Warehouse%2177@db.example.org/orders",
    "AIRFLOW_CONN_AWS": "aws:///?aws_access_key_id=AKIA7PLANTED&aws_secret_access_key=wJalrX%2FutnFEMI+K7MDENG",
    "AIRFLOW_CONN_API": json.dumps({"conn_type": "http", "extra": json.dumps({"client_secret": "inner-secret-77"})}),
    "AIRFLOW_CONN_NESTED": "http://?__extra__=%7B%22nested%22%3A+%7B%22api_key%22%3A+%22deep-Secret-78%22%7D%7D",
    "REPORTS_DSN": "postgresql://db.example.org/reports?user=ann&password=Query-79&connect_timeout=10",
    "STOCK_DSN": "host=db.example.org user=ann password='with spaces, it\\'s 80' dbname=stock",
    "GIT_REMOTE": "https://ghp_aB3dE5gH7jK9mN1pQ3sT@git.example.org/team/models.git",
    "UPLOADS": "https://store.example.org/box?sv=2024-11-04&sig=pL4nt%2Bed9Zk3%3D&se=2030-01-01",
}
INNER = [
    "Warehouse%2177", "Warehouse!77", "AKIA7PLANTED", "wJalrX/utnFEMI+K7MDENG", "inner-secret-77", "deep-Secret-78",
    "Query-79",
    "with spaces, it's 80", "ghp_aB3dE5gH7jK9mN1pQ3sT", "pL4nt+ed9Zk3=", "pL4nt%2Bed9Zk3%3D",
]  # fmt: skip
VALUES = [*SECRETS.values(), *INNER]


def spellings(secret: str) -> dict[str, str]:
    "How a secret may be written, made here without the package"
    basic = base64.b64encode(f"ann:{secret}".encode()).decode()
    shown = {
        "as it is": secret,
        "JSON": json.dumps(secret)[1:-1],
        "JSON in JSON": json.dumps(json.dumps(secret))[3:-3],
        "JSON with its letters": json.dumps(secret, ensure_ascii=False)[1:-1],
        "repr": repr(secret)[1:-1],
        "ascii": ascii(secret)[1:-1],
        "URL": urllib.parse.quote(secret, safe=""),
        "URL with slashes": urllib.parse.quote(secret),
        "form": urllib.parse.quote_plus(secret),
        "HTML": html.escape(secret),
        "base64": base64.b64encode(secret.encode()).decode(),
        "URL-safe base64": base64.urlsafe_b64encode(secret.encode()).decode(),
        "basic authentication": basic[8:],
    }
    lines = [line for line in secret.splitlines() if len(line) >= 8 and not line.startswith("-----")]
    return shown | {f"line {number}": line for number, line in enumerate(lines) if len(lines) > 1}


def leaks(text: str) -> list[str]:
    "The secrets that a text holds, in any spelling"
    found = [(secret, how) for secret in VALUES for how, form in spellings(secret).items() if form in text]
    return [f"{secret[:12]}... ({how})" for secret, how in found]


def check(channels: dict[str, str]) -> None:
    "No channel holds a secret, and none is empty"
    assert not [name for name, text in channels.items() if not text]
    assert {name: found for name, text in channels.items() if (found := leaks(text))} == {}


def strings(value) -> str:
    "All texts in nested values, as a reader of the parsed file sees them"
    if isinstance(value, dict):
        return "\n".join(part for pair in value.items() for part in map(strings, pair))
    return "\n".join(map(strings, value)) if isinstance(value, list | tuple) else str(value)


@pytest.fixture
def planted(project, monkeypatch):
    "A project whose environment holds the secrets"
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return project


LOOK = f"""
import base64, html, json, os, sys, urllib.parse
secrets = [os.environ[name] for name in {list(SECRETS)}]
secrets += {INNER}
"""

PRINT = """
for secret in secrets:
    print(secret)
    print([secret, ascii(secret)], json.dumps(secret), json.dumps(json.dumps({"x": secret}, ensure_ascii=False)))
    print(urllib.parse.quote(secret), urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret))
    print(base64.b64encode(secret.encode()).decode(), base64.urlsafe_b64encode(secret.encode()).decode())
    print("Authorization: Basic", base64.b64encode(f"ann:{secret}".encode()).decode(), file=sys.stderr)
    half = len(secret) // 2
    print(secret[:half], end="", flush=True)
    time.sleep(0.3)
    print(secret[half:], flush=True)
""".replace("for secret", "import time\nfor secret", 1)

SHOW = """
from IPython.display import HTML, Markdown, display
for secret in secrets:
    display(HTML(f"<table><tr><td>{html.escape(secret)}</td></tr></table>"), Markdown(f"see {secret}"))
    display({secret: [secret]})
"""

GLUE = """
import scrapbook as sb
for number, secret in enumerate(secrets):
    sb.glue(f"text {number}", f"made with {secret}")
    sb.glue(f"nested {number}", {"lines": secret.splitlines(), secret.replace("//", "-"): 1.5})
"""


def mlflow_texts(project, run) -> dict[str, str]:
    "What MLflow has of a run"
    data, run_id = project.mlflow.get_run(run.info.run_id), run.info.run_id
    files = {}
    for file in project.mlflow.list_artifacts(run_id, "notebook"):
        path = project.mlflow.download_artifacts(run_id, file.path, str(project.root))
        files[f"MLflow file {file.path}"] = Path(path).read_text()
        if file.path.endswith(".ipynb"):
            files[f"texts in {file.path}"] = strings(nbformat.read(path, as_version=4))
    return files | {
        "MLflow parameters": strings(data.data.params),
        "MLflow tags": strings(data.data.tags),
        "MLflow metric names": strings(list(data.data.metrics)),
        "MLflow run name": data.info.run_name,
    }


def test_a_step_that_succeeds_leaves_no_secret_in_any_channel(planted, caplog):
    caplog.set_level(logging.INFO, "mlpkg.steps")
    notebook = planted.notebook("10_plant", "given: str = 'x'\nsome: list = []", LOOK, PRINT, SHOW, GLUE)
    parameters = {"given": SECRETS["SIGNING_SECRET"], "some": VALUES}
    result = run_step(notebook, parameters, settings=planted.settings, name=f"plant {SECRETS['DB_PASSWORD']}")
    run = planted.mlflow.get_run(result.run_id)
    check(
        mlflow_texts(planted, run)
        | {
            "log": caplog.text,
            "announcements": strings([record.mlpkg for record in caplog.records if hasattr(record, "mlpkg")]),
            "scraps": strings(result.scraps),
        }
    )
    assert "nested 0.___" in run.data.metrics, "numbers are still metrics"


def test_a_step_that_fails_leaves_no_secret_in_any_channel(planted, caplog):
    caplog.set_level(logging.INFO, "mlpkg.steps")
    secret = SECRETS["DB_PASSWORD"]
    # A line of code is shown up to its 60th character: the cut must not save half of the secret from being found.
    fail = f"raise ValueError('{'x' * 28} {secret}', *secrets)"
    with pytest.raises(StepError) as caught:
        run_step(planted.notebook("10_plant", "given: str = 'x'", LOOK, PRINT, fail), settings=planted.settings)
    (run,) = planted.mlflow.search_runs([planted.mlflow.get_experiment_by_name("steps").experiment_id])
    tags = {name: run.data.tags[f"mlpkg.failure.{name}"] for name in ("cell", "error", "traceback")}
    check(
        mlflow_texts(planted, run)
        | {f"failure.{name}": text for name, text in tags.items()}
        | {"log": caplog.text, "exception": str(caught.value)}
    )
    assert secret[:8] not in tags["cell"]


def test_a_parameter_that_is_refused_is_not_quoted_with_its_secret(planted, caplog):
    notebook = planted.notebook("10_plant", "rows: int = 3")
    with pytest.raises(ValueError) as caught:
        run_step(notebook, {"rows": SECRETS["DB_PASSWORD"], KEY: 1}, settings=planted.settings)
    check({"exception": str(caught.value), "log": caplog.text})


def test_the_last_words_of_a_kernel_do_not_begin_with_half_a_secret(monkeypatch, tmp_path):
    from mlpkg.steps.kernels import StepKernel, Tail

    monkeypatch.setenv("DB_PASSWORD", SECRETS["DB_PASSWORD"])
    kernel = StepKernel("python3", tmp_path)
    kernel.tails = {"stderr": Tail()}
    os.write(kernel.tails["stderr"].writing, f"{'x' * 5000}{SECRETS['DB_PASSWORD']}{'y' * 3990}".encode())
    kernel.tails["stderr"].started()
    words = kernel.last_words("stderr")
    assert words.endswith("***" + "y" * 3990) and "unter2xq" not in words


def test_output_that_is_cut_off_does_not_end_in_half_a_secret(planted, tmp_path, monkeypatch):
    monkeypatch.setenv("MLPKG_STEPS__OUTPUT_LIMIT", "100")
    from mlpkg.settings import load_settings

    settings = load_settings(file=planted.root / "settings.ini")
    result = run_step(
        planted.notebook("10_plant", "given: str = 'x'", LOOK, "print('z' * 92 + secrets[0])"), settings=settings
    )
    text = Path(planted.mlflow.download_artifacts(result.run_id, "notebook/plant.ipynb", str(tmp_path))).read_text()
    assert "zzzz" in text and SECRETS["DB_PASSWORD"][:6] not in text


class Hook(http.server.BaseHTTPRequestHandler):
    "Takes messages"

    def do_POST(self):
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        "Nothing"


@pytest.fixture
def hook():
    with answering(Hook) as server:
        server.received = []
        yield server


DAG_FILE = (
    '''
"""A step with secrets: from the environment, from a variable and a connection of Airflow."""

from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import Notify, dag_defaults, recorded_run
from mlpkg.airflow.operators import NotebookOperator

with DAG("planted", schedule=None, **dag_defaults(), params={"given": "x"}, doc_md=__doc__):
    with recorded_run():
        NotebookOperator(
            task_id="plant",
            input_nb="notebooks/10_plant.ipynb",
            dag_params=True,
            outlets=[Asset("made")],
            event_extra=["given", "variable", "text 0"],
            parameters={
                "given": "made with PASSWORD",
                "variable": "{{ var.value.partner_token }}",
                "connection": "{{ conn.partner.password }}",
            },
            on_success_callback=Notify("done", scrap="text 0"),
        )
'''.replace("made with PASSWORD", "{{ task.task_id }} %s")
    % SECRETS["DB_PASSWORD"]
)

OPENED = '''
"""A task that is not a step, and logs a secret and fails with an error that quotes it."""

import logging
import os

from airflow.sdk import DAG, task

from mlpkg.airflow.dags import dag_defaults


@task(retries=0)
def fail():
    logging.getLogger("team").warning("it was tried with %s", os.environ["PARTNER_PASSWORD"])
    raise ValueError("it does not work with " + os.environ["PARTNER_PASSWORD"])


with DAG("opened", schedule=None, **dag_defaults(), doc_md=__doc__):
    fail()
'''

SLIPPED = '''
"""A task with a slip in a log call."""

import logging

from airflow.sdk import DAG, task

from mlpkg.airflow.dags import dag_defaults


@task(retries=0)
def log():
    logging.getLogger("team").warning("rows", 5)


with DAG("slipped", schedule=None, **dag_defaults(), doc_md=__doc__):
    log()
'''

FROM_AIRFLOW = {"variable": "token-of-A-partner", "connection": 'partner\'s "pass" wörd'}


def plant_in_airflow(project) -> None:
    "A variable and a connection in Airflow's own database, which no environment variable shows"
    database = sqlite3.connect(project.root / "var/airflow/airflow.db")
    with contextlib.closing(database), database:
        database.execute(
            "insert into variable (key, val, is_encrypted) values ('partner_token', ?, 0)", [FROM_AIRFLOW["variable"]]
        )
        database.execute(
            "insert into connection (conn_id, conn_type, password, is_encrypted, is_extra_encrypted)"
            " values ('partner', 'http', ?, 0, 0)",
            [FROM_AIRFLOW["connection"]],
        )


def airflow_tables(project) -> dict[str, str]:
    "Every table of Airflow's database, except for those that hold what was planted"
    database = sqlite3.connect(project.root / "var/airflow/airflow.db")
    with contextlib.closing(database):
        names = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        names = [name for name in names if name not in ("variable", "connection", "serialized_dag", "dag_code")]
        return {
            f"Airflow table {name}": strings(database.execute(f'select * from "{name}"').fetchall()) for name in names
        }


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
def test_a_dag_run_leaves_no_secret_in_any_channel(planted, hook, fails):
    values = [*VALUES[:4], *FROM_AIRFLOW.values()]
    (planted.root / "dags" / "planted.py").write_text(DAG_FILE)
    fail = "raise ValueError(f'nothing for {secrets}')" if fails else "print('fine')"
    more = LOOK + "secrets = [*secrets[:4], variable, connection]"
    cells = ["given: str = 'x'\nvariable: str = ''\nconnection: str = ''", more, PRINT, SHOW, GLUE, fail]
    planted.notebook("10_plant", *cells)
    plant_in_airflow(planted)
    place = f"http://127.0.0.1:{hook.server_port}/services/T024BE7LD/xoGrKq7A9bWm"
    settings = {"MLPKG_NOTIFY__CHANNEL": "webhook", "MLPKG_NOTIFY__WEBHOOK": place}
    settings |= {name: value for name, value in SECRETS.items() if name.startswith("AIRFLOW")}
    output = planted.mlpkg("run", "planted", code=int(fails), **settings)
    assert "KeyError" not in output and ("nothing for" in output) == fails

    (run,) = planted.pipeline_runs("planted")
    (step,) = planted.steps(run).values()
    logs = {
        f"log {file.name}": file.read_text(errors="replace") for file in (planted.root / "var/airflow").rglob("*.log")
    }
    artifacts = [file for file in (planted.root / "var/artifacts").rglob("*") if file.is_file()]
    channels = {
        **{f"step: {name}": text for name, text in mlflow_texts(planted, step).items()},
        **{f"run: {name}": text for name, text in mlflow_texts(planted, run).items() if text},
        **{name: text for name, text in airflow_tables(planted).items() if text},
        **{name: text for name, text in logs.items() if text},
        **{f"file {file.name}": file.read_text(errors="replace") for file in artifacts},
        "message": strings([json.loads(text) for text in hook.received]),
        "output of mlpkg run": output,
    }
    assert any(name.startswith("log") for name in channels)
    assert {".ipynb", ".html", ".txt"} <= {file.suffix for file in artifacts}
    assert {"Airflow table rendered_task_instance_fields"} <= channels.keys()
    assert fails or {"Airflow table xcom", "Airflow table asset_event"} <= channels.keys()
    forms = {value: spellings(value) for value in [*values, place]}
    found = {
        name: [(value[:12], how) for value, shown in forms.items() for how, form in shown.items() if form in text]
        for name, text in channels.items()
    }
    assert {name: texts for name, texts in found.items() if texts} == {}
    assert not [name for name, text in channels.items() if not text]


UNREACHABLE = "http://ann:Warehouse77x@127.0.0.1:9"


def full_traceback(error: BaseException) -> str:
    "What Python shows of an error that nobody has handled"
    return "".join(traceback.format_exception(error))


def test_a_task_that_fails_shows_no_secret_in_airflows_log(project):
    (project.root / "dags" / "opened.py").write_text(OPENED)
    project.notebook("10_plant", "rows: int = 3")
    project.mlpkg("run", "opened", code=1, PARTNER_PASSWORD=SECRETS["DB_PASSWORD"])
    logs = {file.name: file.read_text(errors="replace") for file in (project.root / "var/airflow").rglob("*.log")}
    for words in ("it was tried with ***", "it does not work with ***"):
        assert any(words in text for text in logs.values()), words
    check(logs)


def test_the_plugin_tells_airflow_in_the_process_of_a_task(project):
    show = (
        "from airflow.sdk.execution_time.task_runner import TaskRunnerMarker\n"
        "from airflow.sdk.listener import get_listener_manager\n"
        "from airflow.sdk._shared.secrets_masker import redact\n"
        "get_listener_manager().hook.on_starting(component=TaskRunnerMarker())\n"
        "print(redact('no answer from http://ann:Warehouse77x@127.0.0.1:9'))"
    )
    env = project.env | {"MLFLOW_TRACKING_URI": UNREACHABLE}
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=env, timeout=120)
    assert "http://ann:***@127.0.0.1:9" in done.stdout, done.stderr


def test_a_store_that_is_away_is_reported_without_its_password(project, monkeypatch):
    from mlpkg.steps.tracking import TrackingError, client

    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNREACHABLE)
    with pytest.raises(TrackingError) as caught:
        client(project.settings)
    assert "Warehouse77x" not in full_traceback(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "https://chat.example.org/services/T0 xoGrKq7A9bWm",
        "http://127.0.0.1:xoGrKq7A9bWm/",
        "http://127.0.0.1:9/xoGrKq7A9bWm",
    ],
)
def test_a_webhook_that_does_not_work_is_not_quoted(place):
    with pytest.raises(MlpkgError) as caught:
        send(Message("a", "b"), NotifySettings(channel="webhook", webhook=place))
    assert "xoGrKq7A9bWm" not in full_traceback(caught.value) and "notify.webhook" in str(caught.value)


def test_a_message_shows_no_secret(monkeypatch, hook, caplog):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    place = f"http://127.0.0.1:{hook.server_port}/"
    message = Message(f"failed: {VALUES[0]}", "\n".join(VALUES), f"http://ann:{VALUES[0]}@127.0.0.1/#/runs/1")
    send(message, NotifySettings(channel="webhook", webhook=place))
    check({"webhook": strings(json.loads(hook.received[0])), "log": caplog.text})


def test_settings_do_not_show_what_they_declare_secret(project, monkeypatch):
    from mlpkg.settings import SettingsError, load_settings

    webhook = "hooks.example.org/in/Xq93kdPw"  # an address without a scheme is refused, and must not be quoted
    (project.root / "settings.ini").write_text(
        (project.root / "settings.ini").read_text() + f"notify.webhook = {webhook}\n"
    )
    settings = load_settings(file=project.root / "settings.ini", env={})
    assert webhook not in repr(settings) + str(settings) + settings.model_dump_json()
    assert redact(f"sent to {webhook}") == "sent to ***", (
        "a secret in the settings file is as secret as one in the environment"
    )
    with pytest.raises(SettingsError) as caught:
        send(Message("a", "b"), settings.notify.model_copy(update={"channel": "webhook"}))
    assert webhook not in str(caught.value) and "notify.webhook" in str(caught.value)


def test_an_error_that_is_served_shows_no_secret(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", SECRETS["DB_PASSWORD"])
    from mlpkg.serving.http import ApiError, problem_response

    words = f"cannot reach db with {SECRETS['DB_PASSWORD']}"
    answer = problem_response(ApiError(503, "not-stored", words), {"path": "/feedback", "request_id": "1", "state": {}})
    assert SECRETS["DB_PASSWORD"] not in bytes(answer.body).decode() and b"cannot reach db with ***" in answer.body


def test_what_is_short_or_usual_is_left_alone():
    env = {
        "SOME_TOKEN": "true", "DB_PASSWORD": "admin", "POSTGRES_PASSWORD": "postgres", "API_SECRET": "disabled",
        "OTHER_SECRET": "----------------", "MAX_TOKENS": "20130101", "TOKENIZERS_PARALLELISM": "disabled2",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token", "GOOGLE_APPLICATION_CREDENTIALS": __file__,
        "KEYS_PRIVATE_KEY": "-----BEGIN PRIVATE KEY-----\nshort\n-----END PRIVATE KEY-----",
    }  # fmt: skip
    text = " ".join([*env.values(), "truely", "postgresql", "short", "-----BEGIN PRIVATE KEY-----"])
    text = text.replace(env["KEYS_PRIVATE_KEY"], "")
    assert redact(text, env) == text


def test_what_is_not_secret_in_a_connection_is_left_alone():
    env = {
        "ORDERS": "postgresql://orders_reader@warehouse.example.org/orders?sslmode=verify-full",
        "ORDERS_DSN": "postgresql://orders_reader@warehouse.example.org/orders?application_name=nightly-report",
        "AIRFLOW_CONN_AWS": "aws:///?region_name=eu-central-1&endpoint_url=https%3A%2F%2Fs3.example.org",
        "AIRFLOW_CONN_API": json.dumps({"conn_type": "http", "extra": json.dumps({"timeout_word": "patience"})}),
        "AIRFLOW_CONN_GIT": "https://maintainer@git.example.org",
        "AIRFLOW_CONN_SCORING": "https://ml.example.com/models/late-arrivals-model?split=flights_2013",
        "PAGE": "https://docs.example.org/search?q=signatures&page_token_type=opaque-text",
        "NOTES": "password=not-in-a-URL-here",
        "USAGE": "s3://lake/token_usage/day=2013-01-15/part-0",
        "MATRIX": "https://credentials.example.org/x;day=2013-02-16",
    }  # fmt: skip
    text = (
        "orders_reader warehouse.example.org verify-full nightly-report eu-central-1 https://s3.example.org "
        "patience maintainer signatures opaque-text not-in-a-URL-here 2013-01-15/part-0 2013-01-15 2013-02-16 "
        "late-arrivals-model flights_2013 /models/late-arrivals-model"
    )
    assert redact(text, env) == text


def test_a_connection_string_inside_json_is_looked_into():
    env = {
        "AIRFLOW_CONN_ODBC": json.dumps({"extra": {"odbc": "Driver=x;Uid=ann;Pwd=Hunter-Pwd-81;"}}),
        "WAREHOUSE_SECRET": json.dumps({"conn": "host=db password=Hunter-Pwd-82"}),
    }
    assert redact("Hunter-Pwd-81 Hunter-Pwd-82 Driver=x", env) == "*** *** Driver=x"


ROUTE = "/services/T00000000/B00000000/XoGrKq7A9bWmXoGrKq7A9bWm"
MAPS_KEY = "AIzaSyD3x9kQpL7vR2tW8yZ1bN4mC6fH0jK5s"


@pytest.mark.parametrize("name", ["MLPKG_NOTIFY__WEBHOOK", "GEO_API_KEY_URL", "AIRFLOW_CONN_CHAT"])
@pytest.mark.parametrize("target", [ROUTE, f"/api?key={MAPS_KEY}", f"/bot/{MAPS_KEY}/send", f"/#{MAPS_KEY}"])
def test_a_secret_address_is_hidden_where_a_library_quotes_it_without_its_host(name, target):
    import requests

    env = {name: f"http://127.0.0.1:9{target}"}
    with pytest.raises(requests.ConnectionError) as caught:
        requests.post(env[name], json={}, timeout=10)
    shown = redact(f"{caught.value} {target.split('#')[0].split('?')[0]} {target.lstrip('/#')}", env)
    assert not [part for part in (MAPS_KEY, ROUTE.split("/")[-1]) if part in shown] and "127.0.0.1" in shown


def test_the_address_of_a_webhook_is_hidden_in_a_stored_notebook(project, monkeypatch, tmp_path):
    monkeypatch.setenv("SLACK_WEBHOOK_URL", f"http://127.0.0.1:9{ROUTE}")
    fail = "import os, requests\nrequests.post(os.environ['SLACK_WEBHOOK_URL'], json={'rows': rows})"
    with pytest.raises(StepError):
        run_step(project.notebook("10_post", "rows: int = 1", fail), settings=project.settings)
    (run,) = project.mlflow.search_runs([project.mlflow.get_experiment_by_name("steps").experiment_id])
    folder = Path(project.mlflow.download_artifacts(run.info.run_id, "notebook", str(tmp_path)))
    stored = [file.read_text() for file in folder.iterdir()] + [strings(run.data.tags)]
    assert not [text for text in stored if "XoGrKq7A9bWm" in text] and any("with url: ***" in text for text in stored)


def test_ordinary_parts_of_a_secret_address_are_left_alone():
    env = {
        "FLOW_WEBHOOK": "https://flow.example.org/services/run?api-version=2016-10-01&sig=pL4ntEd9Zk3x&since=2013-01-15"
    }
    text = "flow.example.org offers services and api-version of 2016-10-01 since 2013-01-15"
    assert redact(text, env) == text and redact("pL4ntEd9Zk3x", env) == "***"


@pytest.mark.parametrize(
    ("env", "secret"),
    [
        ({"DB_CREDENTIALS": '{"user": "ann", "password": 9876543210}'}, "9876543210"),
        ({"DB_CREDENTIALS": '{"user": "ann", "password": 98765.43210}'}, "98765.43210"),
        ({"DB_CREDENTIALS": "{'user': 'ann', 'password': 'Hunter-Pwd-81'}"}, "Hunter-Pwd-81"),
        ({"DB_CREDENTIALS": "{'password': 9876543210, 'user': 'ann'}"}, "9876543210"),
        ({"DB_CREDENTIALS": "{'password': 'Hunter\\'s-81', 'user': 'ann'}"}, "Hunter's-81"),
        ({"DB_CREDENTIALS": "user: ann\npassword: Hunter-Pwd-81  # old"}, "Hunter-Pwd-81"),
        ({"DB_CREDENTIALS": "user: ann\npassword: 'with spaces: 81'"}, "with spaces: 81"),
        ({"DB_CREDENTIALS": "{user: ann, password: Hunter-Pwd-81, host: db}"}, "Hunter-Pwd-81"),
        ({"DB_SECRET": '{"secret": {"value": "Hunter-Pwd-81"}}'}, "Hunter-Pwd-81"),
        ({"DB_SECRET": '{"secret": {"all": [{"value": 9876543210}]}}'}, "9876543210"),
        ({"X_DSN": "Driver=x;Pwd={Hun}}ter-Pwd-81};"}, "Hun}ter-Pwd-81"),
        ({"X_DSN": "Driver=x;Pwd={Hun}}ter-Pwd-81};"}, "Hun}}ter-Pwd-81"),
        ({"LAKE": "postgresql://ann:p'wd-Hunter81@db/x"}, "p'wd-Hunter81"),
        ({"LAKE": "postgresql://ann:p%27wd\"Hunter81'@db/x"}, "p'wd\"Hunter81'"),
        ({"FUN": "https://f.example.org/run?code=Zx9kQpL7vR2tW8yZ1bN4mC6fH0jK5s=="}, "Zx9kQpL7vR2tW8yZ1bN4mC6fH0jK5s"),
        ({"GEO": f"https://maps.example.org/api?key={MAPS_KEY}"}, MAPS_KEY),
        (
            {"FUNC": "https://f.example.org/run?code=Zx9kQpL7vR2tW8yZ1bN4%2FmC6fH0jK5s=="},
            "Zx9kQpL7vR2tW8yZ1bN4/mC6fH0jK5s==",
        ),
    ],
)
def test_a_secret_is_found_however_it_is_written_in_a_variable(env, secret):
    assert redact(f"see {secret} here", env) == "see *** here"


def test_what_stands_beside_a_secret_is_left_alone():
    env = {
        "A_CREDENTIALS": "{'user': 'ann_the_reader', 'host': 'db.example.org', 'password': 'Hunter-Pwd-81'}",
        "B_CREDENTIALS": "user: ann_the_reader\nhost: db.example.org\ntoken: Hunter-Pwd-82",
        "C_SECRET": json.dumps(
            {"secret": {"user": "ann_the_reader", "type": "opaque-text", "on": "2013-01-15", "x": 1}}
        ),
        "TABLE": "https://store.example.org/box?key=Flights2013/Part-0/january.parquet&code=US-NewYork",
        "A_DSN": "postgresql://token-service:8080/orders_by_day",
    }
    text = (
        "ann_the_reader db.example.org opaque-text 2013-01-15 Flights2013/Part-0/january.parquet US-NewYork 8080/orders"
    )
    assert redact(text, env) == text


# Logs


def root_handler(monkeypatch) -> logging.StreamHandler:
    "The only handler of the root logger, once `redact_structlog` has been there; pytest's own raises slips"
    import structlog

    monkeypatch.setenv("DB_PASSWORD", "Hunter-Pwd-81")
    handler, before = logging.StreamHandler(), structlog.get_config()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    structlog.configure(processors=[lambda logger, name, event: str(event)])
    redact_structlog()
    structlog.configure(**before)
    return handler


SLIPS = {
    "too many arguments": ("no %s for Hunter-Pwd-81", ("rows", "Hunter-Pwd-81", 5)),
    "not a number": ("rows: %d", (ValueError("refused Hunter-Pwd-81"),)),
    "no argument of that name": ("%(rows)s", ({"Hunter-Pwd-81": "Hunter-Pwd-81"},)),
    "no such format": ("100 %! Hunter-Pwd-81", (5,)),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("ours", [True, False], ids=["our logger", "root logger"])
def test_a_log_message_that_does_not_fit_its_arguments_is_reported_as_by_python(monkeypatch, capsys, slip, ours):
    root_handler(monkeypatch)
    message, arguments = SLIPS[slip]
    (get_log("mlpkg.slips") if ours else logging.getLogger("team")).warning(message, *arguments)
    report = capsys.readouterr().err
    assert "--- Logging error ---" in report and "Hunter-Pwd-81" not in report.split("Message: ")[1]
    assert "***" in report.split("Message: ")[1]


def test_an_error_or_a_dict_that_is_logged_as_the_message_is_redacted(monkeypatch):
    root_handler(monkeypatch).setStream(written := io.StringIO())
    logging.getLogger("team").error(ValueError("refused Hunter-Pwd-81"))
    logging.getLogger("team").error({"refused": "Hunter-Pwd-81"})
    assert written.getvalue() == "refused ***\n{'refused': '***'}\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_airflows_own_log_is_redacted_as_text_and_as_json(tmp_path, as_json):
    show = (
        "import logging, sys, structlog\n"
        "from airflow._shared.logging import configure_logging\n"
        "from mlpkg.redaction import redact_structlog\n"
        f"configure_logging(json_output={as_json}, output=sys.stdout.buffer, log_level='INFO')\n"
        "redact_structlog()\n"
        "structlog.get_logger('task').warning('native Hunter-Pwd-81')\n"
        "logging.getLogger('team').warning('standard %s', 'Hunter-Pwd-81')\n"
    )
    env = os.environ | {"PARTNER_PASSWORD": "Hunter-Pwd-81", "AIRFLOW_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=env, timeout=120)
    assert "native ***" in done.stdout and "standard ***" in done.stdout, done.stderr
    assert "Hunter-Pwd-81" not in done.stdout


def test_a_slip_in_a_log_call_does_not_fail_a_task(project):
    (project.root / "dags" / "opened.py").write_text(SLIPPED)
    project.notebook("10_plant", "rows: int = 3")
    project.mlpkg("run", "slipped", PARTNER_PASSWORD=SECRETS["DB_PASSWORD"])


@pytest.mark.parametrize(
    "value",
    [
        "a" * 120_000,
        "a=" * 60_000,
        "[" * 120_000,
        "'=" * 60_000,
        "://?a=" * 20_000,
        "%7B" * 40_000,
        "a={" * 40_000,
        "token: " * 20_000,
        "token:'" * 20_000,
        "a-" * 60_000,
        "https://a/?b=" * 9_000,
        "{'a':" * 20_000,
    ],
)
def test_no_variable_makes_it_slow_to_find_secrets(value):
    start = time.process_time()
    secret_values({"ODD_SECRET": value, "ODD": value})
    assert time.process_time() - start < 5


def test_a_large_notebook_is_redacted_in_a_moment():
    import random

    letters = random.Random(7)
    line = "".join(letters.choices("abcdefghijklmnopqrstuvwxyzABCDEFG0123456789 +/=\\\"'\n", k=100_000))
    env = SECRETS | {
        f"KEY_{number}_TOKEN": "".join(letters.choices("abcdefghij0123456789", k=32)) for number in range(20)
    }
    text = line * 100 + SECRETS["DB_PASSWORD"] + line * 100
    redact("", env)  # the pattern is made once
    start = time.process_time()
    clean = redact(text, env)
    seconds = time.process_time() - start
    assert SECRETS["DB_PASSWORD"] not in clean and len(clean) > 19_000_000
    assert seconds < 10, f"20 MB took {seconds:.1f} s"


@pytest.mark.parametrize(
    "text", ["\\" * 100_000, "&" * 300_000, "%" * 300_000, "a" * 300_000, "://" * 100_000, "=" * 300_000]
)
def test_no_text_makes_redaction_slow(text):
    env = SECRETS | {"ODD_SECRET": 'a\\\\\\\\"\\\\"&&%%%aaaaaaaa', "LONG_SECRET": "\\" * 30 + "abc123"}
    start = time.process_time()
    redact(text, env)
    assert time.process_time() - start < 5


# Pages


EVIL = """<script>alert(1)</script><img src=x onerror="alert(1)"><a href="javascript:alert(1)">a</a>
<iframe src="https://example.org"></iframe><svg onload="alert(1)"><style><img src=x onerror=alert(1)></style></svg>
<meta http-equiv="refresh" content="0;url=https://example.org"><form action="https://example.org"><button>b</button></form>
<link rel="stylesheet" href="https://example.org/x.css"><img src="https://example.org/pixel.png"><base href="https://example.org">
<object data="https://example.org"></object><div style="background:url(https://example.org/p.png)">kept words</div>"""


def active_parts(page: str) -> list[str]:
    "What in a page runs, loads or submits something, as a parser sees it"
    from bs4 import BeautifulSoup

    soup, found = BeautifulSoup(page, "html.parser"), []
    for tag in soup.find_all(True):
        if tag.name in ("script", "iframe", "object", "embed", "link", "base", "form", "frame", "applet"):
            found.append(str(tag)[:80])
        if tag.name == "meta" and tag.get("http-equiv", "").lower() not in ("", "content-security-policy"):
            found.append(str(tag)[:80])
        for name, value in tag.attrs.items():
            address = str(value).strip().lower()
            loads = name in ("src", "srcset", "background", "poster", "data") and not address.startswith("data:image/")
            runs = name.startswith("on") or address.startswith(("javascript:", "vbscript:", "data:text"))
            if loads or runs or name in ("action", "formaction", "srcdoc"):
                found.append(f"{tag.name} {name}={address[:60]}")
    return found


def rendered(*cells) -> str:
    from mlpkg.steps.notebooks import render_html

    return render_html(nbformat.v4.new_notebook(cells=list(cells)), "demo")


def output(**data):
    made = nbformat.v4.new_output("display_data", data={kind.replace("__", "/"): value for kind, value in data.items()})
    return nbformat.v4.new_code_cell("show()", outputs=[made])


def test_a_page_runs_and_loads_nothing_whatever_the_notebook_holds():
    widget = nbformat.v4.new_output(
        "display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    )
    image = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    image.metadata["image/png"] = {"width": "1 onerror=alert(1)", "alt": '"><script>alert(1)</script>'}
    error = nbformat.v4.new_output("error", ename="E", evalue=EVIL, traceback=[EVIL])
    page = rendered(
        nbformat.v4.new_markdown_cell(EVIL),
        nbformat.v4.new_markdown_cell("[a](javascript:alert(1)) ![b](https://example.org/pixel.png)"),
        nbformat.v4.new_raw_cell(EVIL),
        output(text__html=EVIL),
        output(text__markdown=EVIL),
        output(**{"image__svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg'>{EVIL}</svg>"}),
        output(application__javascript="alert(1)"),
        output(**{"text__vnd.mermaid": EVIL}),
        output(text__latex=EVIL),
        output(text__plain=EVIL),
        nbformat.v4.new_code_cell(EVIL, outputs=[widget, image, error]),
    )
    assert active_parts(page) == []
    assert "kept words" in page


def test_a_page_declares_that_nothing_may_run_or_load():
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(rendered(nbformat.v4.new_markdown_cell("# Hello")), "html.parser")
    (policy,) = soup.head.find_all("meta", attrs={"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    before = [tag.name for tag in policy.find_previous_siblings()]
    assert set(before) <= {"meta"}, f"the policy comes before everything that it forbids, not after {before}"


def test_a_page_still_shows_tables_plots_and_prose():
    import pandas as pd

    table = pd.DataFrame({"carrier": ["blue & co", "<red>"], "late": [0.1, 0.2]})
    styled = table.style.background_gradient(subset=["late"]).to_html()
    page = rendered(
        nbformat.v4.new_markdown_cell(
            "# A title\n\n| a | b |\n|---|---|\n| 1 | *2* |\n\n[link](https://example.org) `code`"
        ),
        output(text__html=table.to_html()),
        output(text__html=styled),
        output(image__png="iVBORw0KGgo="),
        output(**{"image__svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'><circle r='5'/></svg>"}),
        output(text__plain="1 < 2"),
    )
    assert "blue &amp; co" in page and "&lt;red&gt;" in page and '<table border="1" class="dataframe">' in page
    assert "background-color" in page and "data:image/png;base64,iVBORw0KGgo=" in page
    assert "data:image/svg+xml;base64," in page and "1 &lt; 2" in page
    assert 'href="https://example.org"' in page and "<em>2</em>" in page


def test_what_only_a_script_could_show_is_replaced_by_words():
    assert "needs a script" in rendered(output(text__html="<div id='p'></div><script>draw('p')</script>"))
    assert "Figure of 3 points" in rendered(
        output(text__html="<div id='p'></div><script>draw('p')</script>", text__plain="Figure of 3 points")
    )
    assert "iVBORw0KGgo=" in rendered(output(text__html="<script>draw('p')</script>", image__png="iVBORw0KGgo="))


def test_a_banner_shows_an_error_as_text():
    from mlpkg.steps.notebooks import mark

    cell = nbformat.v4.new_code_cell("f('`<script>alert(1)</script>')", metadata={"papermill": {"status": "running"}})
    nb = nbformat.v4.new_notebook(cells=[cell])
    mark(nb, "FAILED", "ValueError: <script>alert(1)</script>\n\n# no heading [a](javascript:alert(1)) *b*")
    assert "<script" not in nb.cells[0].source
    page = rendered(nb.cells[0])
    assert active_parts(page) == [] and "# no heading" in page and "*b*" in page and "&lt;script&gt;" in page


# Mail and the MLflow UI


class SecureMailbox(socketserver.StreamRequestHandler):
    "Just enough SMTP to encrypt a connection, log somebody in and receive a message"

    def handle(self):
        self.say("220 here")
        with contextlib.suppress(OSError):
            while line := self.rfile.readline().decode().strip():
                getattr(self, f"on_{line.split()[0].lower()}", self.on_other)(line)

    def say(self, words):
        self.wfile.write(f"{words}\r\n".encode())

    def on_ehlo(self, line):
        self.say("250-here")
        self.say("250-AUTH PLAIN")
        self.say("250 STARTTLS")

    def on_starttls(self, line):
        self.say("220 go on")
        self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        self.rfile, self.wfile = self.request.makefile("rb"), self.request.makefile("wb", buffering=0)

    def on_auth(self, line):
        self.server.logins.append(line)
        self.say("235 welcome")

    def on_data(self, line):
        self.say("354 go on")
        while self.rfile.readline() != b".\r\n":
            pass
        self.server.letters += 1
        self.say("250 fine")

    def on_quit(self, line):
        self.say("221 bye")

    def on_other(self, line):
        self.say("250 fine")


class QuietServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        "A client that hangs up is part of the test"


@pytest.fixture
def secure_mailbox(tmp_path):
    "A mail server whose certificate nobody knows"
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with QuietServer(("127.0.0.1", 0), SecureMailbox) as server:
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(certificate, key)
        server.letters, server.logins, server.certificate = 0, [], certificate
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("trusted", [False, True])
def test_a_password_goes_only_to_a_mail_server_whose_certificate_is_trusted(secure_mailbox, monkeypatch, trusted):
    monkeypatch.setenv("MLPKG_SMTP_USER", "somebody")
    monkeypatch.setenv("MLPKG_SMTP_PASSWORD", "not to be seen")
    rules = NotifySettings(channel="email", email="a@example.org", smtp=f"127.0.0.1:{secure_mailbox.server_address[1]}")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(secure_mailbox.certificate))
        send(Message("a", "b"), rules)
    else:
        with pytest.raises((ssl.SSLError, smtplib.SMTPException), match="certificate"):
            send(Message("a", "b"), rules)
    assert (secure_mailbox.letters, len(secure_mailbox.logins)) == ((1, 1) if trusted else (0, 0))


def test_the_mlflow_ui_gets_no_artifact_folder_called_none(project):
    from mlpkg.cli.main import mlflow_server

    artifacts = project.settings.tracking.artifacts
    command = mlflow_server(project.settings)
    assert command[command.index("--default-artifact-root") + 1] == artifacts
    unset = project.settings.model_copy(
        update={"tracking": project.settings.tracking.model_copy(update={"artifacts": None})}
    )
    assert "None" not in mlflow_server(unset) and "--default-artifact-root" not in mlflow_server(unset)
