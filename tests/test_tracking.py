"""MLflow behind a login and a private authority, with real login and TLS; and how much a step asks of its store."""

import datetime
import inspect
import ipaddress
import os
import signal
import socket
import ssl
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project, wait_for
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mlpkg.serving.loader import ModelLoader
from mlpkg.steps.record import Caching
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import TrackingError, client, log_params, open_pipeline_run, start_step

PASSWORD = "the-password-of-ann"  # noqa: S105
LOGIN = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": PASSWORD}


def issue(name: str, key, issuer: str, signer, *extensions) -> bytes:
    "A certificate as PEM"
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
    made = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    for extension in extensions:
        made = made.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_certificates(folder: Path) -> None:
    "A private authority, and the certificate that it signed for this machine"
    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    known = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    about = (x509.BasicConstraints(ca=True, path_length=None), signs, known)
    (folder / "authority.pem").write_bytes(issue("Private", authority, "Private", authority, *about))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    (folder / "own.pem").write_bytes(issue("mlflow", own, "Private", authority, here, by))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "own.key").write_bytes(own.private_bytes(*form))


def answers(uri: str, authority: Path) -> bool:
    "Does the server answer anybody at all?"
    try:
        context = ssl.create_default_context(cafile=authority)
        return urllib.request.urlopen(f"{uri}/health", timeout=2, context=context).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> tuple[str, Path]:
    "Address of an MLflow server that wants a login, and the file of the authority that signed its certificate"
    root = tmp_path_factory.mktemp("guarded")
    make_certificates(root)
    login = f"[mlflow]\ndefault_permission = EDIT\ndatabase_uri = sqlite:///{root}/login.db\nadmin_username = ann\n"
    rest = "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    (root / "login.ini").write_text(f"{login}admin_password = {PASSWORD}\n{rest}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tls = f"--ssl-keyfile {root}/own.key --ssl-certfile {root}/own.pem"
    stores = ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--artifacts-destination", f"{root}/served"]
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *stores, "--port", str(port)]
    env = {"MLFLOW_AUTH_CONFIG_PATH": str(root / "login.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-this-test"}
    process = Project(root).start(*command, "--workers", "1", "--uvicorn-opts", tls, **env)
    uri = f"https://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(uri, root / "authority.pem"), 180, "the start of MLflow")
        yield uri, root / "authority.pem"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])


@pytest.fixture
def settings(project, guarded):
    "The project's settings with the guarded server"
    tracking = project.settings.tracking.model_copy(update={"uri": guarded[0], "artifacts": None})
    return project.settings.model_copy(update={"tracking": tracking})


def give(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_step_is_recorded_behind_a_login_and_a_private_authority(project, settings, guarded, monkeypatch):
    give(monkeypatch, MLFLOW_TRACKING_SERVER_CERT_PATH=guarded[1], **LOGIN)
    uses = "from mlpkg.steps.tracking import connect\nimport mlflow\nconnect()\nmlflow.log_metric('rows', 3)"
    result = run_step(project.notebook("records", "x: int = 1", uses), settings=settings)
    run = client(settings).get_run(result.run_id)
    assert (run.info.status, run.data.metrics["rows"]) == ("FINISHED", 3)
    stored = [file.path for file in client(settings).list_artifacts(result.run_id, "notebook")]
    assert "notebook/records.ipynb" in stored


REFUSED = {
    "authority": ({}, "has a certificate that is not trusted: .*Set MLFLOW_TRACKING_SERVER_CERT_PATH"),
    "none": ({"MLFLOW_TRACKING_SERVER_CERT_PATH": "{ca}"}, "asks for a login, and none is given: set MLFLOW_TRACKING"),
    "password": (
        {"MLFLOW_TRACKING_SERVER_CERT_PATH": "{ca}", **LOGIN, "MLFLOW_TRACKING_PASSWORD": "another"},
        "does not accept the password of 'ann' .*it said 401",
    ),
    "insecure": ({"MLFLOW_TRACKING_INSECURE_TLS": "true"}, "asks for a login, and none is given"),
    "token": (
        {"MLFLOW_TRACKING_SERVER_CERT_PATH": "{ca}", "MLFLOW_TRACKING_TOKEN": "of-nobody"},
        "does not accept the token in MLFLOW_TRACKING_TOKEN",
    ),
    "file": ({"MLFLOW_TRACKING_SERVER_CERT_PATH": "/no/such.pem", **LOGIN}, "/no/such.pem"),
    "both": (
        {"MLFLOW_TRACKING_SERVER_CERT_PATH": "{ca}", "MLFLOW_TRACKING_INSECURE_TLS": "true"},
        "MLFLOW_TRACKING_INSECURE_TLS",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(settings, guarded, monkeypatch, case):
    env, words = REFUSED[case]
    give(monkeypatch, **{name: value.format(ca=guarded[1]) for name, value in env.items()})
    with pytest.raises(TrackingError, match=f"MLflow at {guarded[0]} .*{words}"):
        client(settings)


def test_doctor_and_the_server_tell_a_wrong_login_from_an_absent_server(project, settings, guarded, monkeypatch):
    wrong = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(guarded[1]), **LOGIN, "MLFLOW_TRACKING_PASSWORD": "another"}
    give(monkeypatch, MLPKG_TRACKING__URI=guarded[0], **wrong)
    words = " ".join(project.look("doctor", code=1).split())
    assert "does not accept the password of 'ann'" in words and "cannot be reached" not in words
    loader = ModelLoader(settings)
    loader.refresh()
    assert loader.issues.now["mlflow"].words.startswith(f"MLflow at {guarded[0]} does not accept the password of 'ann'")


def test_an_address_where_something_else_answers(settings, tmp_path):
    process = Project(tmp_path).start(sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1")
    try:
        port = process.stdout.readline().split(" port ")[1].split()[0]
        tracking = settings.tracking.model_copy(update={"uri": f"http://127.0.0.1:{port}"})
        with pytest.raises(TrackingError, match="is something else than MLflow; it said 404"):
            client(settings.model_copy(update={"tracking": tracking}))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_no_name_is_too_long_or_not_allowed(project):
    mlflow = client(project.settings)
    labels = [f"train [{'x' * 300}{number}]" for number in range(2)]
    names = [mlflow.get_run(start_step(mlflow, project.settings, "train", name=name)).info.run_name for name in labels]
    assert max(map(len, names)) <= 250, "PostgreSQL stores no more"
    assert len(set(names)) == 2 and all(name.startswith("train [xxx") for name in names)
    run_id = start_step(mlflow, project.settings, "train")
    log_params(mlflow, run_id, {"max%": 90, "max?": 80, "max_": 70, "y" * 300: 60})
    logged = mlflow.get_run(run_id).data.params
    assert logged["max_"] == "70" and sorted(logged.values()) == ["60", "70", "80", "90"]


@pytest.fixture
def asked(project, monkeypatch):
    "What is asked of the project's store, as the names of the methods; what one of them asks of another does not count"
    asked, inside = [], threading.local()

    def counted(name: str, method: Callable) -> Callable:
        def call(self, *args, **kwargs):
            if getattr(inside, "store", False):
                return method(self, *args, **kwargs)
            inside.store = True
            try:
                found = method(self, *args, **kwargs)
            finally:
                inside.store = False
            asked.append((name, len(found) if name == "search_experiments" else 0))
            return found

        return call

    client(project.settings)
    for name, method in inspect.getmembers(SqlAlchemyStore, inspect.isfunction):
        if not name.startswith("_"):
            monkeypatch.setattr(SqlAlchemyStore, name, counted(name, method))
    return asked


def test_a_step_asks_its_store_for_little_and_a_cached_one_for_less(project, asked):
    step = project.notebook("10_count", "rows: int = 3", "import scrapbook as sb\nsb.glue('rows', rows)")
    for others in range(30):
        project.mlflow.create_experiment(f"of somebody else {others}")
    for kind, limit in (("executed", 14), ("cached", 6)):
        parent = open_pipeline_run(project.mlflow, project.settings, "small", kind)
        asked.clear()
        result = run_step(step, parent=parent, settings=project.settings, caching=Caching(True))
        names = [name for name, _ in asked]
        assert ("mlpkg.cached_from" in project.mlflow.get_run(result.run_id).data.tags) == (kind == "cached")
        assert len(names) <= limit, f"{kind}: {names}"
        assert sum(found for _, found in asked) <= 1, "it looked through the experiments of others"


def test_runs_names_what_failed_although_every_step_has_succeeded(project):
    from mlpkg.airflow.dags import conclude_run

    parent = open_pipeline_run(project.mlflow, project.settings, "wine_etl", "manual__1")
    for name, status in (("ingest", "FAILED"), ("ingest", "FINISHED"), ("validate", "FINISHED")):
        project.mlflow.set_terminated(start_step(project.mlflow, project.settings, name, parent), status)
    states = {"ingest": "success", "validate": "success", "require_files": "failed", "require_batches": "failed"}
    assert conclude_run(project.mlflow, parent, states) == "FAILED"
    (line,) = [line for line in project.mlpkg("runs", COLUMNS="200").splitlines() if "wine_etl" in line]
    assert line.rstrip().endswith("failed  require_files, require_batches"), line
    assert conclude_run(project.mlflow, parent, dict.fromkeys(states, "success")) == "FINISHED"
    assert "mlpkg.failed_tasks" not in project.mlflow.get_run(parent).data.tags


def test_a_dag_run_is_opened_and_closed_with_few_questions(project, asked):
    from mlpkg.airflow.dags import conclude_run

    parent = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    assert len(asked) <= 4, asked
    for name in ("count", "report"):
        project.mlflow.set_terminated(start_step(project.mlflow, project.settings, name, parent), "FINISHED")
    asked.clear()
    assert conclude_run(project.mlflow, parent, {"count": "success"}) == "FINISHED"
    assert len(asked) <= 7, asked
