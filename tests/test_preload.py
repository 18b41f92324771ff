"""The plugin of Airflow's scheduler: found by Airflow, in the scheduler only, and nothing that makes forking unsafe."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlpkg.airflow.preload import Listener, SchedulerPlugin, preload, try_in_child

FIND = """
from airflow.plugins_manager import _get_plugins
print([plugin.name for plugin in _get_plugins()[0]])
"""


def test_airflow_finds_the_plugin(project):
    done = subprocess.run([sys.executable, "-c", FIND], capture_output=True, text=True, env=project.env, timeout=120)
    assert "'mlpkg'" in done.stdout, done.stderr


@pytest.mark.parametrize("component", ["TriggererJob", "DagProcessorJob", ""])
def test_nothing_is_imported_in_other_components(component, monkeypatch):
    monkeypatch.setattr("mlpkg.airflow.preload.preload", lambda names: pytest.fail("imported"))
    Listener().on_starting(SimpleNamespace(job_type=component))


def test_the_scheduler_imports_what_the_setting_says(monkeypatch):
    asked = []
    monkeypatch.setattr("mlpkg.airflow.preload.preload", asked.append)
    monkeypatch.setenv("MLPKG_AIRFLOW__PRELOAD", "json, csv")
    Listener().on_starting(SimpleNamespace(job_type="SchedulerJob"))
    monkeypatch.setenv("MLPKG_AIRFLOW__PRELOAD", "")
    Listener().on_starting(SimpleNamespace(job_type="SchedulerJob"))
    assert asked == [["json", "csv"], []]


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


def test_a_module_that_kills_the_process_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "deadly_module.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert try_in_child(["deadly_module"]) == {"deadly_module": "the process that tried it died"}


def test_the_plugin_has_one_listener():
    assert [type(one) for one in SchedulerPlugin.listeners] == [Listener]
