"""What the benchmarks share: time and memory of a command and of everything it starts, and the report at the end."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import psutil
import typer
from rich.console import Console
from rich.table import Table

BENCH = Path(__file__).parent
INTERVAL = 0.5  # Seconds between two samples of the memory; each takes some milliseconds from what is measured


@dataclass(frozen=True)
class Measurement:
    "What a command took"

    seconds: float  # Wall time
    cpu_seconds: float  # User and system time of all its processes, kernels forked from templates among them
    peak_mb: float  # Largest sum of memory over these processes at one moment, see `memory_mb`
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
    "A running command; none of its processes is left when the block ends"
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


def templates() -> dict[int, psutil.Process]:
    "The processes of this user that kernels are forked from: whoever asks for a kernel is not its ancestor"
    found, parents = dict[int, psutil.Process](), dict[int, int]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "mlpkg.steps.template" in process.cmdline():  # so are the kernels, which are forks
                found[process.pid], parents[process.pid] = process, process.ppid()
    return {pid: process for pid, process in found.items() if parents[pid] not in found}


def template_seconds(patience: float = 5) -> dict[int, float]:
    "Processor time of each template and its kernels, as soon as these have ended"
    taken, end = {}, time.monotonic() + patience
    for pid, process in templates().items():
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.children() and time.monotonic() < end:
                time.sleep(0.05)
            times = process.cpu_times()
            taken[pid] = times.user + times.system + times.children_user + times.children_system
    return taken


def watch(pid: int, over: threading.Event, seen: list[float]) -> None:
    "Sample the memory of a process tree, and of templates that have kernels, until the event is set"
    while not over.wait(INTERVAL):
        busy = [template for template in templates().values() if template.is_running() and template.children()]
        seen.append(sum(map(memory_mb, [pid, *(template.pid for template in busy)])))


def measure(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> Measurement:
    "Run a command and measure it; CommandError if it fails"
    over, seen, before, begin = threading.Event(), [0.0], template_seconds(0), time.perf_counter()
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
    cpu += sum(taken - before.get(pid, 0) for pid, taken in template_seconds().items())
    return Measurement(seconds, cpu, max(seen), max(0.0, busy - cpu / seconds))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    "A temporary folder that is gone afterwards"
    folder = Path(tempfile.mkdtemp(prefix="mlpkg-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def figures_table(*headings: str, names: str) -> Table:
    "An empty table of figures; the column `names` holds text, the others hold numbers"
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        side: Any = "left" if heading == names else "right"
        table.add_column(heading, justify=side, header_style="bold", no_wrap=True)
    return table


def machine(*packages: str) -> dict[str, Any]:
    "Where this was measured, and with which versions"
    versions = {name: version(name) for name in packages}
    return {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count(), **versions}


def new_console() -> Console:
    "A console that prints lines as they are"
    return Console(highlight=False, soft_wrap=True)


def print_load(console: Console, load: list[tuple[float, float, float]], when: str) -> None:
    "How busy the machine was"
    busy = ", ".join(f"{one:.1f}" for one, _, _ in load)
    console.print(f"{os.cpu_count()} cores; load average {when}: {busy}")


def finish(console: Console, name: str, record: dict[str, Any], faults: list[str]) -> NoReturn:
    "Store what was measured, print which targets were missed, and exit with 1 if there are any"
    path = BENCH / "results" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record | {"faults": faults}, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {path.relative_to(BENCH.parent)}")
    for fault in faults:
        console.print(fault, style="red")
    raise typer.Exit(int(bool(faults)))


def run(main: Callable[..., None]) -> None:
    "Run a benchmark as a command"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        typer.run(main)
    except CommandError as error:
        sys.exit(f"bench: {error}")
