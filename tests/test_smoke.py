"""docker/smoke.sh, with stand-ins for docker and for the services that it would start."""

import http.server
import json
import os
import subprocess
import threading
from contextlib import ExitStack

import pytest
from conftest import ROOT

STEP = {"mlpkg.kind": "step", "mlpkg.step": "clean", "mlflow.parentRunId": "parent"}
FILES = {"files": [{"path": "notebook/clean.ipynb"}, {"path": "notebook/clean.html"}]}


def recorded(run_id: str, tags: dict, status: str) -> dict:
    "A run as MLflow's REST API gives it"
    info = {"run_id": run_id, "run_name": run_id, "status": status}
    return {"info": info, "data": {"tags": [{"key": key, "value": value} for key, value in tags.items()]}}


class Services(http.server.BaseHTTPRequestHandler):
    "Airflow, MLflow and the API, as far as the script asks them"

    def answer(self, body: dict) -> dict | int:
        "JSON, or the code of a refusal"
        path, seen = self.path, self.server.seen
        if path in ("/v1/model", "/metrics", "/docs", "/openapi.json"):
            return 503 if self.headers["X-API-Key"] else 401
        if path == "/auth/token":
            return 401 if body["password"] == "admin" else {"access_token": "token"}
        if path.startswith("/api/v2/"):
            if not self.headers["Authorization"]:
                return 401
            if path.endswith("dagRuns"):
                seen.append(("run", path.split("/")[-2], body["conf"]))
                return {"dag_run_id": f"run-{len(seen)}"}
            return {"dags": [{"dag_id": "etl"}], "state": "success", "task_instances": []}
        assert not self.headers["Authorization"], "Airflow's token is not for MLflow"
        if path.endswith("runs/search"):
            seen.append(("check", body["filter"].split("'")[1]))
            failed = body["filter"].endswith(f"'{self.server.failing}'")
            status = "FAILED" if failed else "FINISHED"
            return {"runs": [recorded("parent", {"mlpkg.kind": "pipeline"}, status), recorded("clean", STEP, status)]}
        return {"experiment": {"experiment_id": "1"}, **FILES}

    def do_GET(self):
        length = int(self.headers["Content-Length"] or 0)
        found = self.answer(json.loads(self.rfile.read(length)) if length else {})
        self.send_response(found if isinstance(found, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    do_POST = do_PATCH = do_GET

    def log_message(self, *args):
        "Nothing"


@pytest.fixture
def smoke(tmp_path):
    "A function that runs the script; what it has asked of the services, and whether docker was called, are attributes"
    (tmp_path / "docker").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\n")
    (tmp_path / "docker").chmod(0o755)
    seen: list[tuple] = []

    def run(*args: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        with ExitStack() as open_servers:
            for name in ("AIRFLOW_PORT", "MLFLOW_PORT", "API_PORT"):
                server = open_servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Services))
                server.seen, server.failing = seen, run.failing
                threading.Thread(target=server.serve_forever, daemon=True).start()
                open_servers.callback(server.shutdown)
                env[name] = str(server.server_port)
            command = [str(ROOT / "docker" / "smoke.sh"), *args]
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    run.seen, run.failing, run.calls = seen, "", tmp_path / "calls"
    return run


def test_a_dag_without_its_conf_is_refused_before_anything_is_built(smoke):
    done = smoke("etl", "{}", "train")
    assert done.returncode == 2 and "'train' has no CONF" in done.stderr
    assert not smoke.calls.exists()


def test_each_run_is_checked_before_the_next_one_begins(smoke):
    done = smoke("etl", '{"months": "2013-01"}', "etl", '{"months": "2013-02"}')
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = ("run", "etl", {"months": "2013-01"}), ("run", "etl", {"months": "2013-02"})
    assert smoke.seen == [first, ("check", "run-1"), second, ("check", "run-3")]
    assert "down --volumes" in smoke.calls.read_text()


def test_nothing_runs_after_a_run_that_failed(smoke):
    smoke.failing = "run-1"
    assert smoke("etl", "{}", "etl", "{}").returncode == 1
    assert smoke.seen == [("run", "etl", {}), ("check", "run-1")]


def test_a_dag_alone_runs_with_its_defaults(smoke):
    assert smoke("etl").returncode == 0
    assert smoke.seen == [("run", "etl", {}), ("check", "run-1")]
