"""The plugin of Airflow's scheduler: found by Airflow, in the scheduler only, and nothing that makes forking unsafe."""

import logging
import os
import signal
import subprocess
import sys
import uuid

import pytest
from airflow.sdk.execution_time.task_runner import TaskRunnerMarker

from mlpkg.airflow.home import airflow_env
from mlpkg.airflow.preload import Listener, SchedulerPlugin, preload
from mlpkg.steps.probe import try_in_child

FIND = """
from airflow.plugins_manager import _get_plugins
print([plugin.name for plugin in _get_plugins()[0]])
"""


def test_airflow_finds_the_plugin(project):
    done = subprocess.run([sys.executable, "-c", FIND], capture_output=True, text=True, env=project.env, timeout=120)
    assert "'mlpkg'" in done.stdout, done.stderr


def test_the_executor_with_many_workers_can_be_used_with_what_is_locked():
    "Its provider allows versions of Celery in which something is missing that it imports"
    from airflow.providers.celery.executors.celery_executor import CeleryExecutor

    assert not CeleryExecutor.is_local


def started(project, component: str, **env: str) -> str:
    "What a component of Airflow writes when it starts, takes one turn, and ends"
    variables = airflow_env(project.settings) | {"AIRFLOW__API_AUTH__JWT_SECRET": uuid.uuid4().hex} | env
    command = [sys.executable, "-X", "faulthandler", "-m", "airflow", component, "--num-runs", "1"]
    process = project.start(*command, **variables)
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # each of its processes says where it is
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def test_the_scheduler_imports_what_the_setting_says_before_it_forks_workers(project):
    output = started(project, "scheduler", MLPKG_AIRFLOW__PRELOAD="json, csv")
    assert "imported 2 modules in" in output
    assert output.index("imported 2 modules in") < output.index("Worker starting up")
    assert "imported 0 modules in" in started(project, "scheduler", MLPKG_AIRFLOW__PRELOAD="")


def test_nothing_is_imported_in_other_components(project):
    assert "modules in" not in started(project, "dag-processor", MLPKG_AIRFLOW__PRELOAD="json, csv")


def test_nothing_is_imported_where_a_task_starts(monkeypatch):
    monkeypatch.setattr("mlpkg.airflow.preload.preload", lambda names: pytest.fail("imported"))
    monkeypatch.setattr(sys, "argv", ["airflow", "scheduler"])  # a task is a fork of it
    Listener().on_starting(TaskRunnerMarker())


def test_what_starts_threads_is_named_and_never_imported_here(tmp_path, monkeypatch, caplog):
    (tmp_path / "busy_module.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60], name='busy', daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO, "mlpkg.airflow.preload"):
        assert preload(["busy_module", "json"]) == ["json"]
    assert "busy_module is not imported before tasks are forked: it starts threads (busy)" in caplog.text
    assert "busy_module" not in sys.modules
    assert "imported 1 modules in" in caplog.text and "memory" in caplog.text


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os\nos._exit(1)", "the process that tried it died"),
        ("import time\ntime.sleep(60)", "took more than 2 seconds"),
        ("raise SystemExit('no license')", "SystemExit: no license"),
    ],
    ids=["dies", "hangs", "exits"],
)
def test_a_module_that_ends_or_holds_up_the_process_is_named_and_the_others_are_imported(
    tmp_path, monkeypatch, code, says
):
    (tmp_path / "deadly_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    problems = try_in_child(["json", "deadly_module", "no_such_module", "csv"], seconds=2)
    assert list(problems) == ["deadly_module", "no_such_module"] and says in problems["deadly_module"]


SEEDED = """import os
import numpy as np
from mlpkg.airflow import preload

preload.in_new_tasks(preload.reseed)


def in_fork(action):
    if not (child := os.fork()):
        action()
        os._exit(0)
    os.waitpid(child, 0)


def task():
    print("task", np.random.rand(), flush=True)
    preload.Listener().on_task_instance_running(None, None)
    np.random.seed(42)
    for _ in range(2):
        in_fork(lambda: print("own", np.random.rand(), flush=True))


np.random.seed(0)
for _ in range(2):
    in_fork(task)
"""


def test_tasks_draw_numbers_of_their_own_and_what_they_fork_draws_theirs(project):
    done = subprocess.run([sys.executable, "-c", SEEDED], env=project.env, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({value for kind, value in lines if kind == "task"}) == 2, done.stderr
    assert [value for kind, value in lines if kind == "own"] == ["0.3745401188473625"] * 4


def test_the_plugin_has_one_listener():
    assert [type(one) for one in SchedulerPlugin.listeners] == [Listener]
