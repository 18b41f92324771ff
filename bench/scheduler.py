"""A real Airflow for a benchmark: scheduler, DAG processor, API server, and Celery's workers if there is a broker."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from measure import CommandError, measure, started

COMPONENTS = ("scheduler", "dag-processor", "api-server")


@dataclass(frozen=True)
class Celery:
    "What Celery needs"

    broker: str  # redis://host:port/number
    database: str  # postgresql://user:password@host:port/name; Airflow keeps its tables there
    workers: int = 2

    def variables(self) -> dict[str, str]:
        "What the components have to know"
        return {
            "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self.database.replace("postgresql://", "postgresql+psycopg2://"),
            "AIRFLOW__CELERY__BROKER_URL": self.broker,
            "AIRFLOW__CELERY__RESULT_BACKEND": f"db+{self.database}",
            "AIRFLOW__CELERY__WORKER_CONCURRENCY": "2",
            "AIRFLOW__CELERY__WORKER_PREFETCH_MULTIPLIER": "1",
        }

    def commands(self, project: Path) -> list[str]:
        "What starts the workers"
        options = "--skip-serve-logs --without-mingle --without-gossip"
        return [
            f"celery worker {options} --celery-hostname bench{number}@%h --pid {project}/worker{number}.pid"
            for number in range(self.workers)
        ]


def free_port() -> int:
    "A port of the loopback that nobody uses"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def airflow_variables(port: int) -> dict[str, str]:
    "What the components have to know"
    return {
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__DAGS_FOLDER": "dags",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__CORE__PARALLELISM": "8",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",  # as docker-compose.yml and `mlpkg ui airflow` have it
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": os.urandom(32).hex(),  # one for all components
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


class Airflow:
    "The REST API of a running Airflow"

    def __init__(self, port: int, log: Path, components: list[subprocess.Popen]):
        self.client, self.log = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60), log
        self.components = components

    def get(self, path: str) -> dict[str, Any]:
        "What is at a path of the API"
        answer = self.client.get(f"/api/v2/{path}")
        answer.raise_for_status()
        return answer.json()

    def wait(self, done, seconds: float, what: str) -> Any:
        "The first true value that `done` returns; CommandError if there is none in time, or a component has ended"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if ended := [one for one in self.components if one.poll() is not None]:
                words = " ".join(map(str, ended[0].args))
                raise CommandError(f"{words} has ended\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if found := done():
                    return found
            time.sleep(0.2)
        raise CommandError(f"{what} took longer than {seconds:.0f} s\n{self.log.read_text()[-3000:]}")

    def login(self) -> bool:
        "Get a token; is the API there?"
        answer = self.client.get("/auth/token")
        answer.raise_for_status()
        self.client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        return True

    def knows(self, dags: set[str]) -> bool:
        "Have these DAGs been read?"
        return dags <= {dag["dag_id"] for dag in self.get("dags?limit=100")["dags"]}

    def over(self, path: str) -> dict[str, Any] | None:
        "A DAG run, if it has ended"
        found = self.get(path)
        return found if found["state"] in ("success", "failed") else None

    def run(self, dag: str, seconds: float = 3600) -> float:
        "Run a DAG; how long it took, as Airflow says"
        made = self.client.post(f"/api/v2/dags/{dag}/dagRuns", json={"logical_date": None})
        made.raise_for_status()
        path = f"dags/{dag}/dagRuns/{made.json()['dag_run_id']}"
        run = self.wait(lambda: self.over(path), seconds, dag)
        if run["state"] != "success":
            raise CommandError(f"{dag} failed\n{self.log.read_text()[-3000:]}")
        begin, end = (datetime.fromisoformat(run[name]) for name in ("start_date", "end_date"))
        return (end - begin).total_seconds()


@contextlib.contextmanager
def running(project: Path, env: dict[str, str], dags: set[str], celery: Celery | None = None) -> Iterator[Airflow]:
    "Airflow with these DAGs; none of its processes is left when the block ends"
    port, log = free_port(), project / "airflow.log"
    env = {**airflow_variables(port), **(celery.variables() if celery else {}), **env}
    airflow = [sys.executable, "-m", "airflow"]
    if celery:
        measure([*airflow, "db", "migrate"], project, env, log)
    with contextlib.ExitStack() as stack:
        commands = [[*airflow, *name.split()] for name in (*COMPONENTS, *(celery.commands(project) if celery else ()))]
        api = Airflow(port, log, [stack.enter_context(started(one, project, env, log)) for one in commands])
        api.wait(api.login, 180, "the start of the API server")
        api.wait(lambda: api.knows(dags), 180, "reading the DAGs")
        yield api
