"""Kernels and what they start, when a process dies outright or is stuck. A page cannot be killed and go on."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import processes_with, wait_for

from mlpkg.steps import launcher, supervisor
from mlpkg.steps.execution import StepError
from mlpkg.steps.kernels import StepKernel, inherited_env, socket_folder
from mlpkg.steps.run import run_step
from mlpkg.steps.warm import expand

RUN = "import sys; from mlpkg.steps.run import run_step; run_step(sys.argv[1])"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl, which only Linux has")

# What a notebook may leave running: a worker, one in a session of its own, and one whose parent has ended.
LEAVES = """
import os, subprocess
subprocess.Popen(["sleep", "1001"])
subprocess.Popen(["sleep", "1002"], start_new_session=True)
subprocess.run(["sh", "-c", "setsid sh -c 'sleep 1003; true' & exec sleep 0.1"])
open({marker!r}, "w").close()
"""
STUCK = {
    "waits": "import time; time.sleep(1000)",
    "holds the interpreter": "import ctypes; ctypes.PyDLL(None).sleep(1000)",
    "ignores signals": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)",
}


@pytest.fixture(params=["cold", "warm"])
def start(request, project) -> str:
    "How kernels start, in the settings of the project; the template for warm ones is ready"
    settings = project.root / "settings.ini"
    warm = request.param == "warm"
    settings.write_text(settings.read_text() + f"\nkernels.warm = {'yes' if warm else 'no'}\n")
    rules = project.settings.kernels
    if warm:
        modules = expand(rules.preload)
        address = launcher.template_address(sys.executable, modules, project.env)
        launcher.start_template(sys.executable, address, modules, 60, rules.most, project.env)
        wait_for(lambda: Path(address).exists(), 120, "a template")
    return request.param


def command_line(pid: int) -> str:
    "The command line of a process; empty where it has ended"
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def left(project) -> list[str]:
    "Command lines of all processes that belong to this project"
    return [words for pid in processes_with(str(project.root)) if (words := command_line(pid))]


def start_stuck_step(project, stuck: str):
    "A step in a process of its own, whose kernel has started other processes and is stuck"
    marker = project.root / "started"
    notebook = project.notebook("stuck", "x: int = 1", LEAVES.format(marker=str(marker)) + STUCK[stuck])
    process = project.start(sys.executable, "-c", RUN, str(notebook))
    wait_for(marker.exists, what="the second cell")
    assert {"1001", "1002", "1003"} <= set(" ".join(left(project)).split())
    return process


@LINUX
@pytest.mark.parametrize("stuck", STUCK)
def test_nothing_outlives_a_step_whose_process_is_killed_outright(project, start, stuck):
    process = start_stuck_step(project, stuck)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not left(project), 5, "the end of all processes")


@LINUX
def test_nothing_outlives_a_step_that_is_terminated(project, start):
    process = start_stuck_step(project, "holds the interpreter")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert left(project) == []


@LINUX
@pytest.mark.parametrize("which", [0, 1], ids=["outer", "inner"])
def test_nothing_outlives_a_step_that_is_terminated_while_a_supervisor_is_stopped(project, which):
    process = start_stuck_step(project, "holds the interpreter")
    os.kill(supervisors(project)[which], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    wait_for(lambda: not left(project), 5, "the end of all processes")


@LINUX
@pytest.mark.parametrize("end", ["x = 2", "import os; os.abort()"])
def test_nothing_outlives_a_step_that_ends(project, start, end):
    notebook = project.notebook("ends", "x: int = 1", LEAVES.format(marker=str(project.root / "started")), end)
    try:
        run_step(notebook, settings=project.settings)
    except StepError as error:
        assert "the kernel was killed by SIGABRT" in str(error)
    assert left(project) == []


def is_kernel(words: str) -> bool:
    "Is this the command line of a kernel, by itself or from a template?"
    return "ipykernel_launcher" in words.partition(" -f ")[0] and "supervisor" not in words or "steps.template" in words


def supervisors(project) -> tuple[int, int]:
    "The supervisors of this project's kernel, the outer one first"
    (kernel,) = [pid for pid in processes_with(str(project.root)) if is_kernel(command_line(pid))]
    parents = supervisor.parents()
    return parents[parents[kernel]], parents[kernel]


@LINUX
@pytest.mark.parametrize("stuck", STUCK)
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_nothing_outlives_a_supervisor_that_is_killed_outright(project, start, which, stuck):
    process = start_stuck_step(project, stuck)
    outer, inner = supervisors(project)
    os.kill(outer if which == "outer" else inner, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert "the kernel was killed by SIGKILL" in output
    wait_for(lambda: not left(project), 5, "the end of all processes")


@LINUX
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_nothing_outlives_a_step_that_is_killed_together_with_a_supervisor(project, start, which):
    process = start_stuck_step(project, "holds the interpreter")
    outer, inner = supervisors(project)
    for pid in (process.pid, outer if which == "outer" else inner):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not left(project), 5, "the end of all processes")


@LINUX
def test_a_kernel_dies_with_both_of_its_supervisors(project, start):
    process, both = start_stuck_step(project, "holds the interpreter"), supervisors(project)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # or one of them may see the other's end, and end everything
        for pid in both:
            os.kill(pid, number)
    process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_kernel, left(project))), 5, "the end of the kernel")
    assert len(left(project)) >= 3, "what it has started stays"


STATE = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
state = {name: status[name] for name in ("SigBlk", "SigIgn", "SigCgt", "Uid", "Groups", "NoNewPrivs")}
state |= {"folder": os.getcwd(), "session": os.getsid(0) == os.getpid(), "files": len(os.listdir("/proc/self/fd"))}
env = {**os.environ, "JPY_PARENT_PID": os.environ["JPY_PARENT_PID"] == str(os.getppid())}
print(json.dumps(state | {"env": env}))
"""


def state_of(command: list[str], folder: Path) -> dict:
    "What a process finds that is started as Jupyter starts a kernel"
    env = {**os.environ, "JPY_PARENT_PID": str(os.getpid())}
    options = {"cwd": folder, "env": env, "start_new_session": True, "stdin": subprocess.DEVNULL}
    return json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True, **options).stdout)


def behind_a_supervisor(*command: str) -> list[str]:
    return [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), *command]


@LINUX
def test_a_supervisor_changes_neither_signals_nor_environment_nor_folder(tmp_path):
    command = [sys.executable, "-c", STATE]
    assert state_of(behind_a_supervisor(*command), tmp_path) == state_of(command, tmp_path)


@LINUX
def test_a_kernel_dies_with_its_supervisor(project):
    process = subprocess.Popen(behind_a_supervisor("sleep", "1004"), env=project.env)
    wait_for(lambda: any(words.split() == ["sleep", "1004"] for words in left(project)), 30, "the start")
    process.kill()
    process.wait()
    wait_for(lambda: not left(project), 5, "the end")


ODD = """
import os, subprocess, sys
quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
first = subprocess.Popen(["sleep", "1005"], start_new_session=True, **quiet)
second = subprocess.Popen([b"sh", *map(os.fsencode, sys.argv[1:])], start_new_session=True, **quiet)
print(first.pid, second.pid, flush=True)
"""


@LINUX
@pytest.mark.parametrize("odd", ["argument", "lock of what looks like a template"])
def test_nothing_outlives_a_kernel_whatever_bytes_a_command_line_has(tmp_path, odd):
    (tmp_path / "mlpkg.steps.template").write_text("sleep 1006\n")  # a script for `sh -m`
    (tmp_path / "a.lock").write_bytes(b"\xff\xfe")
    words = ["-c", "sleep 1006; :", b"caf\xe9.csv"] if odd == "argument" else ["-m", "mlpkg.steps.template", "a"]
    command = behind_a_supervisor(sys.executable, "-c", ODD, *words)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd=tmp_path)
    alive = [pid for pid in map(int, done.stdout.split()) if Path(f"/proc/{pid}").exists()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert (done.returncode, done.stderr, alive) == (0, b"", [])


CHATTY = "for _ in range(1000): print('x' * 99_999)\nimport sys; print('too old'); sys.exit('the end')"


def memory() -> int:
    "Bytes that this process has in memory"
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@LINUX
def test_what_a_kernel_prints_fills_neither_disk_nor_memory(tmp_path, monkeypatch):
    spec = {"argv": [sys.executable, "-c", CHATTY, "{connection_file}"], "language": "python", "display_name": "chatty"}
    (tmp_path / "kernels" / "chatty").mkdir(parents=True)
    (tmp_path / "kernels" / "chatty" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    kernel, threads, sizes = StepKernel("chatty", socket_folder()), threading.active_count(), []

    async def run():
        await kernel.start_kernel(env=inherited_env())
        before = memory()
        while await kernel.is_alive():
            sizes.append(sum(file.stat().st_size for file in kernel.folder.iterdir()))
            await asyncio.sleep(0.01)
        sizes.append(sum(file.stat().st_size for file in kernel.folder.iterdir()))
        assert memory() - before < 10e6

    try:
        asyncio.run(run())
        assert max(sizes) < 1e6
        assert kernel.death().words == "the end", "what it printed is not the reason"
        words = kernel.start_failure().words
        assert len(words) == 4000 and words.endswith("xxx\ntoo old\nthe end")
    finally:
        kernel.close()
    assert threading.active_count() == threads


def test_a_kernel_does_not_wait_for_who_still_holds_its_pipe():
    from mlpkg.steps.kernels import Tail

    tail = Tail()
    other = os.dup(tail.writing)  # as in a process that was forked at the wrong moment
    tail.started()
    os.write(other, b"the end")
    tail.finish()
    assert tail.text() == "the end"
    tail.stop()
    assert not tail.thread.is_alive()
    os.close(other)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_a_program_printed_is_not_the_error_of_a_killed_kernel(project, caplog, stream):
    say = f"import os, signal, sys; print('of a program', file=sys.__{stream}__, flush=True)"
    notebook = project.notebook("killed", "x: int = 1", say, "os.kill(os.getpid(), signal.SIGKILL)")
    with caplog.at_level(logging.ERROR, "mlpkg.steps"), pytest.raises(StepError) as caught:
        run_step(notebook, settings=project.settings)
    assert caught.value.traceback == ("of a program" if stream == "stderr" else "")
    logged = caplog.records[-1].getMessage()
    assert "the kernel was killed by SIGKILL (out of memory?)" in logged
    assert ("of a program" in logged) == (stream == "stderr")
