"""A small project in a temporary folder: its own settings, notebooks, DAGs, MLflow and Airflow, all real."""

import contextlib
import gc
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from forked import run_mlpkg

from mlpkg.settings import Settings
from mlpkg.testing import settings_text, write_notebook

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent


def wait_for(condition: Callable[[], object], seconds: float = 60, what: str = "the condition"):
    "Wait until a condition holds, and return what it returned"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"timed out after {seconds} s waiting for: {what}")


@contextlib.contextmanager
def answering(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[http.server.ThreadingHTTPServer]:
    "A web server on a port of its own for as long as the block runs"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[int]:
    "The application behind a real port, in this process"
    import uvicorn

    from mlpkg.serving.app import connection_options, create_app

    app = create_app(settings)
    options = connection_options(settings.serving)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **options))  # any that is free
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        wait_for(lambda: running.started, 30, "the server to start")
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()


def processes_with(text: str) -> list[int]:
    "PIDs of the processes whose command line, environment or folder contains a text; zombies have none of these"
    found = []
    for line in subprocess.run(["ps", "axwwe", "-o", "pid=,args="], capture_output=True, text=True).stdout.splitlines():
        pid, _, rest = line.strip().partition(" ")
        if text in rest + folder_of(pid) and int(pid) != os.getpid() and "axwwe" not in rest:
            found.append(int(pid))
    return found


def folder_of(pid: str) -> str:
    "The working folder of a process, where the system tells: that of a kernel from a template is its notebook's"
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


# What is imported stays: looking through it for garbage, again and again, takes a third of the time of an import.
gc.set_threshold(50_000, 20, 50)

soon_idle = {"MLPKG_KERNELS__IDLE": "60"}  # The template of the kernels ends soon after the last test


@dataclass
class Project:
    "A project on disk, and ways to run things in it"

    root: Path

    @property
    def env(self) -> dict[str, str]:
        "A clean environment that points to this project"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLPKG_", "MLFLOW_", "AIRFLOW"))}
        shown = {"COLUMNS": "200", "NO_COLOR": "1"}
        return {**kept, "MLPKG_SETTINGS": str(self.root / "settings.ini"), **soon_idle, **shown}

    def notebook(self, name: str, *cells: str, **kwargs) -> Path:
        "A step notebook of this project"
        return write_notebook(self.root / "notebooks" / f"{name}.ipynb", *cells, **kwargs)

    def start(self, *command: str, **env: str) -> subprocess.Popen:
        "Start a command in the project, in a process group of its own"
        return subprocess.Popen(
            command, cwd=self.root, env=self.env | env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def mlpkg(self, *args: str, code: int | None = 0, timeout: float = 300, **env: str) -> str:
        "Run the command line and return its output"
        returned, output = run_mlpkg(args, self.root, self.env | env, timeout)
        assert code is None or returned == code, output
        return output

    def look(self, *args: str, code: int = 0) -> str:
        "Run a command that does not start Airflow, in this process with MLflow already imported; return its output"
        from typer.testing import CliRunner

        from mlpkg.cli.main import app

        env = {"MLPKG_SETTINGS": str(self.root / "settings.ini"), "COLUMNS": "200", "NO_COLOR": "1"}
        result = CliRunner().invoke(app, args, env=env)
        assert result.exit_code == code, result.output
        return result.output

    @property
    def settings(self):
        from mlpkg.settings import load_settings

        return load_settings(file=self.root / "settings.ini", env={})

    @property
    def mlflow(self):
        "A client of the project's MLflow store"
        from mlflow import MlflowClient

        uri = self.settings.tracking.uri
        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def pipeline_runs(self, dag: str) -> list:
        "Pipeline runs of a DAG, newest first"
        from mlpkg.steps.tracking import pipeline_runs

        return pipeline_runs(self.mlflow, dag)

    def steps(self, run) -> dict:
        "Step runs of a pipeline run, by the name shown"
        from mlpkg.steps.tracking import step_runs

        return {step.info.run_name: step for step in step_runs(self.mlflow, run.info.run_id)}

    def stored(self, run) -> nbformat.NotebookNode:
        "The notebook that a step run stored, or has sent so far"
        from mlpkg.steps.live import latest_notebook

        folder = self.root / "downloads"
        folder.mkdir(exist_ok=True)
        artifact = latest_notebook(self.mlflow, run.info.run_id, run.data.tags["mlpkg.step"])
        path = self.mlflow.download_artifacts(run.info.run_id, artifact, str(folder))
        return nbformat.read(path, as_version=4)

    def artifacts(self, run) -> list[str]:
        "Names in a run's notebook folder"
        return [Path(file.path).name for file in self.mlflow.list_artifacts(run.info.run_id, "notebook")]


# Files whose tests take longest in all, the longest first: none of them is left for one process at the end.
LONG = (
    "test_init", "test_retention", "test_promotion", "test_resume", "test_packaging", "test_new", "test_outbox",
    "test_kernels", "test_dag_runs", "test_pipelines", "test_steps", "test_jobs", "test_pins", "test_flights",
    "test_bench", "test_lake", "test_monitoring", "test_arrivals", "test_docs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Start with the files that take longest"
    place = {name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    "No test sees store, experiment or settings of another: `mlflow.set_tracking_uri` and others leave variables"
    mlflow_sets = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")
    for name in (*mlflow_sets, "MLPKG_SETTINGS", "MLPKG_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in soon_idle.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> Path:
    "An empty Airflow database and MLflow store, made once: each project starts with a copy"
    root = tmp_path_factory.mktemp("stores")
    (root / "settings.ini").write_text(settings_text())
    (root / "dags").mkdir()
    project = Project(root)
    make = (
        "from pathlib import Path; from mlpkg.settings import load_settings; from mlpkg.steps.tracking import client;"
        "from mlpkg.airflow.home import use_airflow, prepare_database;"
        "s = load_settings(); client(s); use_airflow(s); prepare_database(s)"
    )
    done = subprocess.run([sys.executable, "-c", make], cwd=root, env=project.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def git(project: Project, *args: str) -> str:
    "Run git in a project"
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", *name, *args], cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(project: Project, message: str) -> str:
    git(project, "add", "-A")
    git(project, "commit", "-qm", message)
    return git(project, "rev-parse", "HEAD")


def example_project(root: Path, stores: Path) -> Project:
    "A project with the real DAGs and notebooks of the example, and empty stores"
    text = (ROOT / "settings.ini").read_text()
    assert (minimum := "promotion.minimum = roc_auc: 0.6\n") in text
    # One month holds a handful of days out, on which the bound of a model that reaches 0.65 is below 0.6.
    (root / "settings.ini").write_text(text.replace(minimum, "promotion.minimum = roc_auc: 0.5\n"))
    shutil.copytree(ROOT / "dags", root / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs" / "pipelines", root / "nbs" / "pipelines")
    shutil.copytree(stores / "var", root / "var")
    return Project(root)


@pytest.fixture
def project(tmp_path, stores) -> Project:
    "A project with the DAGs of tests/dags and small notebooks"
    root = tmp_path / "project"
    root.mkdir()
    (root / "settings.ini").write_text(settings_text())
    shutil.copytree(HERE / "dags", root / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "var" / "airflow").mkdir(parents=True)
    for file in ("var/airflow/airflow.db", "var/airflow/mlpkg-migrated", "var/mlflow.db"):
        shutil.copy(stores / file, root / file)
    made = Project(root)
    made.notebook("10_count", "rows: int = 3  # How many rows", "import scrapbook as sb\nsb.glue('rows', rows)")
    made.notebook("20_report", "factor: float = 2.0", "import scrapbook as sb\nsb.glue('doubled', factor * 2)")
    yield made
    for pid in processes_with(str(root)):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["folder", "s3"])
def root(request, tmp_path):
    "Location for a fresh lake"
    if request.param == "folder":
        return str(tmp_path / "lake")
    if not os.environ.get("AWS_ENDPOINT_URL"):
        pytest.skip("set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of an S3 server to test with it")
    boto3 = pytest.importorskip("boto3", reason="pip install boto3 to test with an S3 server")
    bucket = f"lake-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/lake"
