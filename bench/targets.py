"""Are the targets reached? Runs the benchmarks, and the commands of a newcomer in a fresh clone, and prints one table.

All of it takes two hours on a machine with nothing else to do. Each part keeps what it measured as soon as it ends, so
that a run which was stopped goes on with the parts that are missing; the table names the commit of each figure.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import BENCH, CommandError, measure, new_console, run, scratch
from rich.table import Table

ROOT = BENCH.parent
RECORDS = BENCH / "results" / "targets"
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


_spoils = ("different", "did not")  # In a fault: what was measured is not comparable


def benchmark(name: str, *options: str) -> dict[str, Any]:
    "Run a benchmark that prints its own table, and return its record"
    results = BENCH / "results"
    before = set(results.glob(f"{name}-*.json"))
    subprocess.run([sys.executable, BENCH / f"{name}.py", *options])
    if not (new := set(results.glob(f"{name}-*.json")) - before):
        raise CommandError(f"bench/{name}.py left no record")
    record = json.loads(new.pop().read_text(encoding="utf-8"))
    if wrong := [fault for fault in record["faults"] if any(words in fault for words in _spoils)]:
        raise CommandError(f"bench/{name}.py compared different work: {'; '.join(wrong)}")
    return record


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
    more = (both["mlpkg run, one by one"] - both["plain script"]) / record["steps"]  # as the script does it
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
    yield Target(
        name, "0.88", record["speed"][0]["ratio"], 0.95, "", least=True
    )  # the other table is ten times as long


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


def of_newcomer(clone: Path, env: dict[str, str], runs: int) -> Iterator[Target]:
    "What somebody waits for who has just cloned"
    log, taken = clone.parent / "output.log", []
    yield Target("`make setup` in a fresh clone", "145 s", measure(["make", "setup"], clone, env, log).seconds, 60)
    for _ in range(runs):
        shutil.rmtree(clone / "var", ignore_errors=True)
        taken.append(measure(["make", "run"], clone, env, log).seconds)
        subprocess.run([clone / ".venv/bin/mlpkg", "kernels", "stop", "--all"], cwd=clone, env=env, check=True)
    yield Target("`make run` after set-up", "115 s", statistics.median(taken), 60)


def of_suite(clone: Path, env: dict[str, str]) -> Iterator[Target]:
    "What somebody waits for who has changed something"
    log = clone.parent / "output.log"
    measure(["make", "setup"], clone, env, log)
    yield Target("`make test`", "13 min", measure(["make", "test"], clone, env, log).seconds / 60, 8, "min")


@dataclass(frozen=True)
class Options:
    "How often, and how long"

    repeat: int
    grow: tuple[int, ...]


Found = tuple[list[Target], dict[str, Any]]  # What has a target, and the record of the benchmark


def steps(options: Options) -> Found:
    "Chains of notebooks, in all ways to run one"
    record = benchmark("steps", f"--repeat={options.repeat}", *(f"--grow={count}" for count in options.grow))
    return [*of_steps(record)], record


def training(options: Options) -> Found:
    "The example's training"
    record = benchmark("train", f"--repeat={options.repeat}")
    return [*of_training(record)], record


def newcomer(options: Options) -> Found:
    "Set-up and first run in a fresh clone"
    with scratch() as folder, fresh_clone(folder) as env:
        return [*of_newcomer(folder / "clone", env, options.repeat)], {}


def suite(_: Options) -> Found:
    "All tests in a fresh clone"
    with scratch() as folder, fresh_clone(folder) as env:
        return [*of_suite(folder / "clone", env)], {}


def serving(_: Options) -> Found:
    "The API"
    record = benchmark("serve")
    return [*of_serving(record)], record


def batch(_: Options) -> Found:
    "Predictions of a year"
    record = benchmark("batch")
    return [*of_batch(record)], record


def peers(_: Options) -> Found:
    "Other tools, for the page on speed"
    return [], benchmark("peers")


PARTS: dict[str, Callable[[Options], Found]] = {
    one.__name__: one for one in (steps, training, newcomer, suite, serving, batch, peers)
}


def commit() -> str:
    "What is measured; an error if it is nothing that somebody could check out"
    asked = ("status", "--porcelain", "--untracked-files=no"), ("rev-parse", "--short", "HEAD")
    changed, head = (subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip() for words in asked)
    if changed:
        raise CommandError(f"commit these changes first, so that the figures are those of a commit:\n{changed}")
    return head


def kept(part: str) -> dict[str, Any] | None:
    "The newest record of a part"
    path = RECORDS / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measure_part(part: str, options: Options, head: str) -> None:
    "Measure a part, and keep its record"
    load, begun = os.getloadavg(), time.perf_counter()
    found, record = PARTS[part](options)
    about = {"commit": head, "date": time.strftime("%Y-%m-%d"), "minutes": (time.perf_counter() - begun) / 60}
    about |= {"load_average": [load, os.getloadavg()], "targets": [asdict(one) for one in found], "record": record}
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{part}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def table_of(records: dict[str, dict[str, Any]]) -> Table:
    "Each target, and what was found"
    table = Table(*("", "before", "target", "found", "reached", "commit"), box=None, pad_edge=False)
    for record in records.values():
        for target in record["targets"]:
            table.add_row(*Target(**target).row(), record["commit"])
    return table


def remember(records: dict[str, dict[str, Any]]) -> None:
    "Add records to the history, without what identifies a machine; figures with four digits are enough"
    about = {name: {k: v for k, v in one.items() if k not in ("targets", "record")} for name, one in records.items()}
    found = [target for one in records.values() for target in one["targets"]]
    more = {name: records[name]["record"] for name in ("steps", "training", "peers") if name in records}
    for record in more.values():
        record["machine"].pop("system", None)
    entry = {"date": time.strftime("%Y-%m-%d"), "version": version("mlpkg"), "targets": found, "parts": about, **more}
    history = json.loads(HISTORY.read_text(encoding="utf-8")) if HISTORY.exists() else []
    short = json.loads(json.dumps([*history, entry]), parse_float=lambda text: float(f"{float(text):.4g}"))
    HISTORY.write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")


def main(
    part: Annotated[list[str], typer.Argument(help="Measure these again; without: those that this commit lacks")] = [],  # noqa: B006
    repeat: Annotated[int, typer.Option(help="Runs of each way to run a step, and of `make run`", min=1)] = 5,
    grow: Annotated[list[int], typer.Option(help="Lengths of longer chains; repeat for each")] = [10, 100],  # noqa: B006
    measuring: Annotated[bool, typer.Option("--measure/--show", help="Measure, or only show what is there")] = True,
    keep: Annotated[bool, typer.Option(help="Add what was found to bench/history.json?")] = False,
):
    """Run every benchmark that has a target, part by part; the exit code is 1 if one is missed or lacks a part."""
    if unknown := set(part) - PARTS.keys():
        raise CommandError(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console, head = new_console(), commit()
    wanted = part or [one for one in PARTS if (kept(one) or {}).get("commit") != head]
    for name in wanted if measuring else ():
        console.rule(name)
        measure_part(name, Options(repeat, tuple(grow)), head)
    records = {name: record for name in PARTS if (record := kept(name))}
    console.print("\n", table_of(records))
    loads = ", ".join(f"{name} {one['load_average'][0][0]:.1f}" for name, one in records.items())
    console.print(f"{os.cpu_count()} cores; load average before each part: {loads}")
    missed = [one["name"] for record in records.values() for one in record["targets"] if not Target(**one).reached]
    old = [f"older: {name} is of {one['commit']}" for name, one in records.items() if one["commit"] != head]
    lacking = [f"lacking: {name}" for name in PARTS if name not in records]
    for fault in (faults := [f"missed: {name}" for name in missed] + old + lacking):
        console.print(fault, style="red")
    if keep:
        remember(records)
    raise typer.Exit(int(bool(faults)))


if __name__ == "__main__":
    run(main)
