"""Are the targets reached? Runs the benchmarks, and the commands of a newcomer in a fresh clone, and prints one table.

It takes more than an hour on a machine with nothing else to do.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import BENCH, CommandError, finish, machine, measure, new_console, print_load, run, scratch
from rich.table import Table

ROOT = BENCH.parent
HISTORY = BENCH / "history.json"  # What the page on speed shows


@dataclass(frozen=True)
class Target:
    "Something that was promised, and what was found"

    name: str
    before: str  # As it was at commit c1a9ada, on a machine of the same size
    found: float
    bound: float
    unit: str = "s"
    least: bool = False  # Is more better?

    @property
    def reached(self) -> bool:
        "Does it hold?"
        return self.found >= self.bound if self.least else self.found <= self.bound

    def row(self) -> list[str]:
        "Its line of the table"
        limit = f"{'at least' if self.least else 'at most'} {self.bound:g} {self.unit}"
        return [self.name, self.before, limit, f"{self.found:.3g} {self.unit}", "yes" if self.reached else "NO"]


def benchmark(name: str, *options: str) -> dict[str, Any]:
    "Run a benchmark that prints its own table, and return its record"
    results = BENCH / "results"
    before = set(results.glob(f"{name}-*.json"))
    subprocess.run([sys.executable, BENCH / f"{name}.py", *options])
    if not (new := set(results.glob(f"{name}-*.json")) - before):
        raise CommandError(f"bench/{name}.py left no record")
    return json.loads(new.pop().read_text(encoding="utf-8"))


def of_steps(record: dict[str, Any]) -> Iterator[Target]:
    "What a step costs"
    count = record["steps"]

    def taken(where: str, way: str) -> float:
        return statistics.median(record["seconds"][where][f"{way} | usual | {count}"]) / count

    empty = taken("LocalExecutor", "empty tasks, warm")
    ours = taken("LocalExecutor", "mlpkg, warm") - empty
    stock = taken("LocalExecutor", "stock operator, cold") - taken("LocalExecutor", "empty tasks, cold")
    unchanged = {kind: statistics.median(values) for kind, values in record["unchanged"].items()}
    yield Target("a step over an empty Airflow task, LocalExecutor, usual imports", "10 to 11 s", ours, 1.0)
    yield Target("the same, share of the stock operator's overhead", "1.25", ours / stock, 0.125, "")
    yield Target(
        "unchanged second run of a 10-step DAG, cached, beyond Airflow's own time",
        "all of it", unchanged["cached"] - unchanged["empty"], 1.0,
    )  # fmt: skip


def of_training(record: dict[str, Any]) -> Iterator[Target]:
    "What the steps of the example's training cost, Airflow's start included"
    both = {name: found["seconds"] for name, found in record["results"].items()}
    more = (both["mlpkg run"] - both["plain script"]) / record["steps"]
    yield Target("a step over the plain script, `mlpkg run`", "9.9 s", more, 1.0)


def of_serving(record: dict[str, Any]) -> Iterator[Target]:
    "What the API does"
    results = record["results"]
    for connections, before, bound in (("8", "16.7 times", 25), ("1", "3.4 times", 8)):
        both = {name: found["per_second"] for name, found in results[connections].items()}
        words = f"API, one record, {connections} connection{'s' * (connections != '1')}, against `mlflow models serve`"
        yield Target(words, before, both["mlpkg"] / both["mlflow"], bound, "times", least=True)
    yield Target("the same, 8 connections, median answer", "12 ms", results["8"]["mlpkg"]["p50"], 6, "ms")


def of_batch(record: dict[str, Any]) -> Iterator[Target]:
    "What batch predictions do"
    name = "batch, one year, against `predict_proba` on rows in memory"
    yield Target(name, "0.88", record["speed"][-1]["ratio"], 0.95, "", least=True)


@contextlib.contextmanager
def fresh_clone(folder: Path) -> Iterator[dict[str, str]]:
    "A clone of this repository, and the environment of somebody who has nothing else but a full download cache"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
    kept = ("PATH", "LANG", "PIP_", "UV_", "SSL_", "AWS_", "XDG_CACHE_HOME")
    env = {key: value for key, value in os.environ.items() if key.startswith(kept)}
    env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if not p.startswith(str(ROOT)))
    for name in ("home", "run"):
        (folder / name).mkdir(mode=0o700)
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    yield env | {"HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder / "run"), "XDG_CACHE_HOME": cache}


def newcomer(runs: int, suite: bool, tell) -> Iterator[Target]:
    "What somebody waits for who has just cloned"
    with scratch() as folder, fresh_clone(folder) as env:
        clone, log, taken = folder / "clone", folder / "output.log", []
        tell("make setup")
        yield Target("`make setup` in a fresh clone", "145 s", measure(["make", "setup"], clone, env, log).seconds, 60)
        for turn in range(runs):
            tell(f"make run, {turn + 1} of {runs}")
            shutil.rmtree(clone / "var", ignore_errors=True)
            taken.append(measure(["make", "run"], clone, env, log).seconds)
            subprocess.run([clone / ".venv/bin/mlpkg", "kernels", "stop", "--all"], cwd=clone, env=env, check=True)
        yield Target("`make run` after set-up", "115 s", statistics.median(taken), 60)
        if suite:
            tell("make test")
            yield Target("`make test`", "13 min", measure(["make", "test"], clone, env, log).seconds / 60, 8, "min")


def remember(record: dict[str, Any]) -> None:
    "Add a record to the history, without what identifies a machine; figures with four digits are enough"
    for one in (record, *record.values()):
        if isinstance(one, dict) and "machine" in one:
            one["machine"].pop("system")
    history = json.loads(HISTORY.read_text(encoding="utf-8")) if HISTORY.exists() else []
    short = json.loads(json.dumps([*history, record]), parse_float=lambda text: float(f"{float(text):.4g}"))
    HISTORY.write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")


def main(
    repeat: Annotated[int, typer.Option(help="Runs of each way to run a step, and of `make run`", min=1)] = 5,
    suite: Annotated[bool, typer.Option(help="Also run the whole test suite?")] = True,
    peers: Annotated[bool, typer.Option(help="Also run other tools, for the page on speed?")] = True,
    grow: Annotated[list[int], typer.Option(help="Lengths of longer chains; repeat for each")] = [10, 100, 1000],  # noqa: B006
    keep: Annotated[bool, typer.Option(help="Add what was found to bench/history.json?")] = False,
):
    """Run every benchmark that has a target; the exit code is 1 if one is missed."""
    console, load, begun = new_console(), [os.getloadavg()], time.perf_counter()
    lengths = [f"--grow={count}" for count in grow]
    steps = benchmark("steps", f"--repeat={repeat}", *lengths)
    found = [*of_steps(steps), *of_training(benchmark("train", f"--repeat={repeat}"))]
    load.append(os.getloadavg())
    with console.status("") as status:
        found += newcomer(repeat, suite, status.update)
    load.append(os.getloadavg())
    found += [*of_serving(benchmark("serve")), *of_batch(benchmark("batch"))]
    load.append(os.getloadavg())
    table = Table(*("", "before", "target", "found", "reached"), box=None, pad_edge=False)
    for target in found:
        table.add_row(*target.row())
    console.print("\n", table)
    print_load(console, load, "at the start, after the steps, after the fresh clone, at the end")
    minutes = (time.perf_counter() - begun) / 60
    record = {"targets": [asdict(one) for one in found], "minutes": minutes, "machine": machine(), "load_average": load}
    if keep:
        more = {"steps": steps} | ({"peers": benchmark("peers")} if peers else {})
        remember({"date": time.strftime("%Y-%m-%d"), "version": version("mlpkg"), **record, **more})
    finish(console, "targets", record, [f"missed: {one.name}" for one in found if not one.reached])


if __name__ == "__main__":
    run(main)
