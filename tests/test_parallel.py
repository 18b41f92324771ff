"""How the parent of parallel tasks waits for them, and what it builds for them. Real processes."""

import json
import os
import selectors
import subprocess
import sys
import time
from uuid import uuid4

import pytest

from mlpkg.airflow import parallel
from mlpkg.airflow.listening import listening
from mlpkg.airflow.parallel import Child, Tasks


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(parallel, "fail_unless_over", lambda *_: None)
    return Tasks(dag=None, jobs=3)


def child(tasks: Tasks, live) -> int:
    "Run a function in a child that writes to a pipe of the parent, as a task does; its process"
    reading, writing = os.pipe()
    if not (process := os.fork()):
        try:
            os.setpgid(0, 0)
            os.close(reading)
            live(writing)
        finally:
            os._exit(0)
    os.close(writing)
    tasks.children[reading] = Child(process, uuid4(), "task")
    tasks.selector.register(reading, selectors.EVENT_READ)
    return process


def chat(pipe: int) -> None:
    for number in range(60):
        os.write(pipe, json.dumps({"event": "cell", "cell": number}).encode() + b"\n")
        time.sleep(0.1)


def leave_somebody_behind(pipe: int) -> None:
    "End while a process that has inherited the pipe, in a group of its own, lives on"
    os.write(pipe, b'{"event": "end"}\n')
    if not os.fork():
        os.setpgid(0, 0)
        time.sleep(4)
        os._exit(0)


def test_a_task_that_has_ended_is_noticed_while_another_one_talks(tasks):
    talking, ended = child(tasks, chat), child(tasks, leave_somebody_behind)
    began, heard = time.monotonic(), []
    with listening(heard.append):
        tasks.wait()
    assert [one.process for one in tasks.children.values()] == [talking]
    assert time.monotonic() - began < 2
    assert {"event": "end"} in heard, ended
    os.kill(talking, 9)
    tasks.wait()
    assert not tasks.children


def test_the_last_words_of_a_task_are_heard(tasks):
    "They may come between the last look at its pipe and the moment when it is found to have ended"
    process = child(tasks, lambda pipe: os.write(pipe, b'{"event": "end"}\n'))
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    heard: list[dict] = []
    with listening(heard.append):
        tasks.take_leave(next(iter(tasks.children)), os.WNOHANG)
    assert not tasks.children and heard == [{"event": "end"}]


def test_without_children_it_waits_for_a_second(tasks):
    began = time.monotonic()
    tasks.wait()
    assert 0.9 < time.monotonic() - began < 1.5


FALLBACK = """
import contextlib, sys
from mlpkg.settings import load_settings
from mlpkg.airflow import home, local, task_api
home.use_airflow(load_settings())
if len(sys.argv) > 1:
    @contextlib.contextmanager
    def renamed():
        raise ImportError("cannot import name '_DELETED_ROUTE_TAG'")
        yield
    task_api.newest_version_only = renamed
task_api.build_task_api()
from airflow.sdk.execution_time.supervisor import in_process_api_server
print("versions:", len(in_process_api_server().app.versions.versions))
"""


@pytest.mark.parametrize(("argument", "versions"), [([], 1), (["renamed"], 9)])
def test_where_airflow_has_changed_the_whole_api_is_built(project, argument, versions):
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, *argument], cwd=project.root, env=project.env, capture_output=True, text=True
    )
    assert f"versions: {versions}" in done.stdout, done.stderr
