"""Wall time, processor time and peak memory of a command and of everything it starts."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.5  # Seconds between two looks at the memory; a look takes some milliseconds from what is measured


@dataclass(frozen=True)
class Measurement:
    "What a command took"

    seconds: float  # Wall time
    cpu_seconds: float  # User and system time of all its processes
    peak_mb: float  # Largest sum of memory over its processes at one moment, see `memory_mb`
    others: float  # Cores that everything else on the machine took meanwhile, on average


class CommandError(RuntimeError):
    "A measured command that failed; the message ends with what it printed"


def tree(pid: int) -> list[psutil.Process]:
    "A process and its descendants, also those in other process groups, as kernels are"
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def memory_mb(pid: int) -> float:
    "Memory of a process tree: proportional set sizes, so that shared pages count once; resident sizes off Linux"
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it may have ended meanwhile
            total += process.memory_full_info().pss if sys.platform == "linux" else process.memory_info().rss
    return total / 2**20


@contextlib.contextmanager
def started(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    "A running command; nothing of it is left when the block ends"
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out)
    try:
        yield process
    finally:
        if process.returncode is None:
            for left in reversed(tree(process.pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.wait()


def watch(pid: int, over: threading.Event, seen: list[float]) -> None:
    "Look at the memory of a process tree until it is over"
    while not over.wait(INTERVAL):
        seen.append(memory_mb(pid))


def measure(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> Measurement:
    "Run a command and watch it; CommandError where it fails"
    over, seen, begin = threading.Event(), [0.0], time.perf_counter()
    psutil.cpu_percent()  # from here on
    with started(command, cwd, env, log) as process:
        watcher = threading.Thread(target=watch, args=(process.pid, over, seen))
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds, process.returncode = time.perf_counter() - begin, os.waitstatus_to_exitcode(status)
            busy = psutil.cpu_percent() / 100 * (os.cpu_count() or 1)
        finally:
            over.set()
            watcher.join()
    if process.returncode:
        raise CommandError(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measurement(seconds, cpu, max(seen), max(0.0, busy - cpu / seconds))
