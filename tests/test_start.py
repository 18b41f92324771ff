"""`mlpkg` in a child of the template: the same as a cold command, to streams, terminals, signals and exit codes.

Real templates, terminals and pipelines; a folder of its own for the sockets, so that no other template answers.
"""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import Project, processes_with, wait_for

from mlpkg.cli.start import settings_forbid
from mlpkg.steps import launcher, supervisor
from mlpkg.steps.probe import usual

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="templates fork, which is safe on Linux only")
MLPKG = str(Path(sys.executable).parent / "mlpkg")
SLOW = "from pathlib import Path\nimport time\nPath({marker!r}).touch()\ntime.sleep(300)"
WARM = {"yes": {}, "no": {"MLPKG_KERNELS__WARM": "no"}}


@pytest.fixture(scope="module")
def address():
    "A template of the usual modules that is ready"
    with tempfile.TemporaryDirectory(prefix="mlpkg-test-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        env = {**os.environ, **launcher.step_env()}
        found = launcher.template_address(sys.executable, usual, env)
        launcher.start_template(sys.executable, found, usual, 600, 8, env)
        wait_for(lambda: os.path.exists(found), 120, "a template")
        yield found
        facts = ask(found)
        supervisor.kill(os.kill, facts["pid"], signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{facts['pid']}"), 20, "the end of the template")


def ask(address: str) -> dict:
    line, facts = launcher.send_request(address, {"ask": "facts"})
    line.close()
    return facts


def programs(address: str) -> set[int]:
    "What the template has made and is still there"
    return {pid for pid in map(int, ask(address)["kernels"]) if is_there(pid)}


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_text())  # empty for what has just ended
    return False


def start_slow(project: Project, *before: str, **env: str) -> subprocess.Popen:
    "A run that is in the second cell of its first step"
    marker = project.root / "started"
    marker.unlink(missing_ok=True)
    project.notebook("10_count", "rows: int = 3", SLOW.format(marker=str(marker)))
    process = project.start(*before, MLPKG, "run", "small", **env)
    wait_for(marker.exists, 120, "the second cell")
    return process


def statuses(project: Project) -> tuple[str, str]:
    "Of the last run and of its only step"
    run = project.pipeline_runs("small")[0]
    (step,) = project.steps(run).values()
    return run.info.status, step.info.status


def test_a_run_comes_from_the_template(address, project):
    process = start_slow(project)
    made = programs(address)
    below = supervisor.parents()
    mine = [pid for pid in made if folders_below(pid, below) >= {str(project.root)}]
    assert len(made) == 2 and len(mine) >= 1  # the command and the kernel of its step
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)


def folders_below(pid: int, parents: dict[int, int]) -> set[str]:
    found = set()
    for one in (pid, *supervisor.descendants(pid, parents)):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{one}/cwd"))
    return found


@pytest.mark.parametrize("warm", ["yes", "no"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_stores_what_there_is(address, project, warm, number):
    process = start_slow(project, **WARM[warm])
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert statuses(project) == ("KILLED", "KILLED")
    wait_for(lambda: not programs(address), 20, "the end of everything")


@pytest.mark.parametrize("warm", ["yes", "no"])
def test_nothing_is_left_of_a_command_that_is_killed_outright(address, project, warm):
    process = start_slow(project, **WARM[warm])
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not processes_with(str(project.root)), 20, "the end of everything")
    assert "0 left" in project.mlpkg("sync")
    assert statuses(project) == ("KILLED", "KILLED")


def test_the_supervisor_is_killed(address, project):
    process = start_slow(project)
    for pid in programs(address):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: not processes_with(str(project.root)), 20, "the end of everything")


def test_a_command_that_must_not_hear_the_terminal_close_does_not(address, project):
    process = start_slow(project, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert statuses(project) == ("KILLED", "KILLED")


@pytest.mark.parametrize("command", [["runs"], ["run", "no_such_dag"], ["notebook", "nobody", "count"], ["no-command"]])
def test_output_and_exit_code_are_those_of_a_cold_command(address, project, command):
    done = [
        subprocess.run([MLPKG, *command], cwd=project.root, env=project.env | env, capture_output=True, text=True)
        for env in WARM.values()
    ]
    warm, cold = [(one.returncode, one.stdout, one.stderr) for one in done]
    assert warm == cold


def test_a_terminal_shows_a_live_table(address, project):
    project.notebook(
        "10_count", "rows: int = 3", "import scrapbook as sb\nimport time\ntime.sleep(2)\nsb.glue('rows', rows)"
    )
    ours, theirs = pty.openpty()
    env = project.env | {"TERM": "xterm"}
    process = subprocess.Popen([MLPKG, "run", "small"], cwd=project.root, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # reading ends with an error when the other side is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    assert process.wait() == 0
    assert re.search(r"cell \d of \d", shown.decode()) and re.search(r"count +finished", shown.decode())


# Runs a module of the standard library in a child of the template, and ends as it does
PROGRAM = """
import sys
from mlpkg.steps import launcher
from mlpkg.steps.supervisor import end_like
line, answer = launcher.send_request(sys.argv[1], launcher.request_for(sys.argv[2:], sys.argv[2] + ":main"))
end_like(launcher.watch_kernel(line, answer["supervisor"]))
"""


@pytest.mark.parametrize("text", ['{"late": true}', "{late"])
def test_a_program_reads_writes_and_fails_as_in_a_process_of_its_own(address, tmp_path, text):
    words = [[sys.executable, "-c", PROGRAM, address, "json.tool"], [sys.executable, "-m", "json.tool"]]
    warm, cold = [
        subprocess.run(one, input=text, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "TZ": "UTC"})
        for one in words
    ]
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert bool(cold.returncode) == (text == "{late")


def test_settings_can_switch_it_off(address, project):
    file = project.root / "settings.ini"
    file.write_text(file.read_text().replace("[local]", "[local]\nkernels.warm = no", 1))
    slow = start_slow(project)
    assert not programs(address)
    slow.send_signal(signal.SIGTERM)
    slow.communicate(timeout=120)
    assert statuses(project) == ("KILLED", "KILLED")


@pytest.mark.parametrize("word", ["no", "False", "0", "off"])
def test_it_can_be_switched_off(word, tmp_path):
    assert settings_forbid(tmp_path, {"MLPKG_KERNELS__WARM": word})
    assert not settings_forbid(tmp_path, {"MLPKG_KERNELS__WARM": "yes"})


# What a child of the template does with signals, and what it leaves behind
PROBE = """
import os, signal, subprocess, sys
from pathlib import Path


def tell():
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN]
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    left = subprocess.Popen(["sleep", "60"], start_new_session=True, **nowhere)
    print([int(number) for number in ignored], left.pid, sys.stdin.seekable())
"""


def run_probe(address: str, *before: str) -> tuple[list[int], int, bool]:
    "Signals that are ignored, a process that is left behind on purpose, and whether standard input can be sought"
    code = PROGRAM.replace('sys.argv[2] + ":main"', '"probe_of_test_start:tell"')
    words = [*before, sys.executable, "-c", code, address, "probe"]
    done = subprocess.run(words, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ignored, pid, seekable = done.stdout.strip().rsplit(" ", 2)
    return json.loads(ignored), int(pid), seekable == "True"


def test_signals_are_those_of_who_asks_and_not_those_of_who_started_the_template(tmp_path, monkeypatch):
    (tmp_path / "probe_of_test_start.py").write_text(PROBE)
    with tempfile.TemporaryDirectory(prefix="mlpkg-test-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        found = launcher.template_address(sys.executable, ["json"])
        start = (
            "import sys; from mlpkg.steps import launcher\n"
            f"launcher.start_template(sys.executable, {found!r}, ['json'], 600, 8)"
        )
        subprocess.run(["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", sys.executable, "-c", start], check=True)
        wait_for(lambda: os.path.exists(found), 60, "a template")
        try:
            ignored, left, seekable = run_probe(found)
            assert (ignored, seekable) == ([], False)
            assert is_there(left)  # it has ended by itself, so what it has left stays
            os.kill(left, signal.SIGKILL)
            ignored, left, _ = run_probe(found, "sh", "-c", 'trap "" HUP; exec "$@"', "sh")
            assert ignored == [signal.SIGHUP]
            os.kill(left, signal.SIGKILL)
        finally:
            supervisor.kill(os.kill, ask(found)["pid"], signal.SIGTERM)
            wait_for(lambda: not os.path.exists(found), 20, "the end of the template")


def test_a_command_with_a_closed_stream_starts_cold(address, project):
    words = ["sh", "-c", f"{MLPKG} runs <&-"]
    done = subprocess.run(words, cwd=project.root, env=project.env, capture_output=True, text=True)
    assert done.returncode == 0 and "cold" not in done.stderr


def test_a_template_that_hangs_is_not_waited_for(address, project):
    pid = ask(address)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        done = subprocess.run(
            [MLPKG, "runs"], cwd=project.root, env=project.env, capture_output=True, text=True, timeout=120
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 0
    assert done.stderr.startswith("mlpkg: a cold start, because the template does not answer")


def test_a_template_of_other_code_ends(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="mlpkg-test-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        other = launcher.template_address(sys.executable, ["json"])[:-12] + "0" * 12
        launcher.start_template(sys.executable, other, ["json"], 600, 8)
        log = Path(f"{other}.log")
        wait_for(lambda: log.exists() and "is another one" in log.read_text(), 60, "its last words")
        wait_for(lambda: not launcher.alive(other), 20, "the end of the template")
        assert not os.path.exists(other)
