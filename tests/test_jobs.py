"""Steps side by side, as `mlpkg run --jobs` does them. Real processes and signals, which a page cannot show."""

import os
import re
import signal
import sqlite3
import sys
import threading

import pytest
from conftest import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps are forked, which is safe on Linux only")

# Ends only while the other one runs as well.
MEETS = """
import time
from pathlib import Path
here = Path("{folder}")
(here / f"here-{{rows}}").touch()
end = time.monotonic() + 60
while len(list(here.glob("here-*"))) < 2 and time.monotonic() < end:
    time.sleep(0.05)
assert len(list(here.glob("here-*"))) == 2, "it is alone"
"""
GLUES = "import scrapbook as sb\nsb.glue('rows', rows)"
TOTAL = ("counts: list = []", "import scrapbook as sb\nsb.glue('total', sum(c['rows'] for c in counts))")
COMMAND = (sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "mapped", "--jobs", "2")


def log_of(project) -> str:
    return "".join(path.read_text() for path in (project.root / "var/airflow/logs").glob("mlpkg-run-*.log"))


def states(project) -> dict[str, str]:
    (run,) = project.pipeline_runs("mapped")
    return {"": run.info.status} | {name: step.info.status for name, step in project.steps(run).items()}


def kernels(project) -> list[int]:
    from test_steps import kernels

    return kernels(project)


def test_mapped_steps_run_at_the_same_time(project):
    project.notebook("10_count", "rows: int = 3", MEETS.format(folder=project.root), GLUES)
    project.notebook("30_total", *TOTAL)
    output = project.mlpkg("run", "mapped", "--jobs", "2")
    assert set(states(project).values()) == {"FINISHED"}
    for name in ("count \\[1\\]", "count \\[2\\]", "total"):
        assert len(re.findall(f"mapped +{name} finished", output)) == 1
    (run,) = project.pipeline_runs("mapped")
    assert project.steps(run)["total"].data.metrics["total"] == 3
    assert "database is locked" not in log_of(project) and "cell 1 of" in log_of(project)


def test_with_one_job_they_run_one_after_the_other(project):
    # Whoever comes first waits in vain, so neither of them succeeds.
    meets = MEETS.format(folder=project.root).replace("+ 60", "+ 2")
    project.notebook("10_count", "rows: int = 3", meets, GLUES)
    project.notebook("30_total", *TOTAL)
    output = project.mlpkg("run", "mapped", "--jobs", "1", code=1)
    assert "it is alone" in output


def test_with_too_little_memory_it_is_one_at_a_time_and_says_so(project):
    project.notebook("30_total", *TOTAL)
    output = project.mlpkg("run", "mapped", MLPKG_STEPS__MEMORY="100000")
    assert "One step at a time on " in output and "a step is taken to need 100000 GB (steps.memory)" in output
    assert set(states(project).values()) == {"FINISHED"}


def test_a_failing_step_does_not_stop_its_sibling(project):
    fails = "if rows == 1:\n    raise ValueError('no such row')\nimport time\ntime.sleep(3)"
    project.notebook("10_count", "rows: int = 3", MEETS.format(folder=project.root), fails, GLUES)
    project.notebook("30_total", *TOTAL)
    output = project.mlpkg("run", "mapped", "--jobs", "2", code=1)
    assert states(project) == {"": "FAILED", "count [1]": "FAILED", "count [2]": "FINISHED"}
    assert "mapped failed" in output and "count [1]: cell 3" in output and "ValueError: no such row" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_steps_and_their_kernels(project, number):
    cell = f"from pathlib import Path\nPath(f'{project.root}/at-{{rows}}').touch()\nimport time\ntime.sleep(600)"
    project.notebook("10_count", "rows: int = 3", cell)
    process = project.start(*COMMAND)
    wait_for(lambda: len(list(project.root.glob("at-*"))) == 2, 120, "both steps")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert states(project) == {"": "KILLED", "count [1]": "KILLED", "count [2]": "KILLED"}
    assert output.count(f"ended by {number.name}") >= 2
    assert not kernels(project)


def test_a_command_that_is_killed_outright_takes_its_steps_along(project):
    cell = f"from pathlib import Path\nPath(f'{project.root}/at-{{rows}}').touch()\nimport time\ntime.sleep(600)"
    project.notebook("10_count", "rows: int = 3", cell)
    process = project.start(*COMMAND)
    wait_for(lambda: len(list(project.root.glob("at-*"))) == 2, 120, "both steps")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not kernels(project), 15, "the end of the kernels")
    assert "0 left" in project.mlpkg("sync")
    assert set(states(project).values()) == {"KILLED"}


def test_a_process_of_a_task_that_is_killed_counts_as_failed(project):
    cell = f"from pathlib import Path\nPath(f'{project.root}/at-{{rows}}').touch()\nimport time\ntime.sleep(5)"
    project.notebook("10_count", "rows: int = 3", cell, GLUES)
    process = project.start(*COMMAND)
    wait_for(lambda: len(list(project.root.glob("at-*"))) == 2, 120, "both steps")
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        child = min(map(int, file.read().split()))
    os.kill(child, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    found = states(project)
    assert found.pop("") in ("FAILED", "KILLED"), "KILLED if the newest of its steps was killed, as each of them may be"
    assert sorted(found.values()) == ["FINISHED", "KILLED"]
    assert "ended with code -9 before the task did" in log_of(project)


LEAVES = """
import os, signal, time
from airflow.sdk import DAG, task

with DAG("leaves", schedule=None):
    @task
    def lost():
        if not os.fork():
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    lost()
"""


def test_what_a_killed_task_has_left_behind_does_not_hold_up_the_run(project):
    (project.root / "dags" / "leaves.py").write_text(LEAVES)
    output = project.mlpkg("run", "leaves", "--jobs", "2", code=1)
    assert "leaves failed" in output
    assert "the process of task lost ended with code -9 before the task did" in log_of(project)
    wait_for(lambda: not project_processes(project), 5, "the end of the process that it has left")


def project_processes(project) -> list[int]:
    from conftest import processes_with

    return [pid for pid in processes_with(f"MLPKG_SETTINGS={project.root}") if pid != os.getpid()]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_of_jobs_that_makes_no_sense(project, value):
    output = project.mlpkg("run", "mapped", f"--jobs={value}", code=2)
    assert f"--jobs {value}: expected a whole number from 1 on. Leave it out to let cores and memory decide" in output
    assert project.pipeline_runs("mapped") == []


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_waits_for_airflows_database_while_another_process_writes(project, jobs):
    writer = sqlite3.connect(project.root / "var/airflow/airflow.db", check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(20, writer.rollback)
    timer.start()
    project.mlpkg("run", "small", "--jobs", jobs)
    timer.join()
    writer.close()


DRAWS = """
from airflow.sdk import DAG, task

with DAG("draws", schedule=None):
    @task
    def draw(number):
        import random
        import numpy
        open("drawn", "a").write(f"{numpy.random.rand()} {random.random()}\\n")
    draw.expand(number=[1, 2, 3])
"""


def test_each_task_draws_numbers_of_its_own(project):
    (project.root / "dags" / "draws.py").write_text(DRAWS)
    project.mlpkg("run", "draws", "--jobs", "2")
    drawn = (project.root / "drawn").read_text().split()
    assert len(drawn) == len(set(drawn)) == 6


ALONE = """
from airflow.models.pool import Pool
from airflow.sdk import DAG, task

with DAG("alone", schedule=None, **{of_dag}):
    @task(**{of_task})
    def alone(number):
        import time
        began = time.time()
        time.sleep(2)
        open("times", "a").write(f"{{began}} {{time.time()}}\\n")
    alone.expand(number=[1, 2])
"""


@pytest.mark.parametrize(
    ("of_dag", "of_task"),
    [
        ({"max_active_tasks": 1}, {}),
        ({}, {"max_active_tis_per_dag": 1}),
        ({}, {"max_active_tis_per_dagrun": 1}),
        ({}, {"pool_slots": 100}),  # of 128
    ],
)
def test_limits_of_airflow_hold_for_tasks_side_by_side(project, of_dag, of_task):
    (project.root / "dags" / "alone.py").write_text(ALONE.format(of_dag=of_dag, of_task=of_task))
    project.mlpkg("run", "alone", "--jobs", "2")
    first, second = sorted(
        tuple(map(float, line.split())) for line in (project.root / "times").read_text().splitlines()
    )
    assert first[1] <= second[0], "they ran at the same time"


WAITS = """
from airflow.sdk import DAG, task

with DAG("waits", schedule=None):
    @task.sensor(poke_interval=600, timeout=3600, mode="reschedule")
    def arrives():
        open("looked", "a").write("x")
        return False
    arrives()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_waits_for_the_next_look_of_a_sensor(project, number):
    (project.root / "dags" / "waits.py").write_text(WAITS)
    process = project.start(*COMMAND[:-3], "waits", *COMMAND[-2:])
    wait_for((project.root / "looked").exists, 120, "the first look")
    wait_for(lambda: "up_for_reschedule" in log_of(project).lower(), 60, "its end")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "waits failed" in output, output
