"""How fast are batch predictions, compared with the model alone on rows in memory? And does memory stay flat?"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import BENCH, CommandError, figures_table, finish, machine, new_console, print_load, run, scratch
from rich.table import Table

LEAST = 0.90  # Share of the model's own throughput that batch prediction must reach
GROWTH = 1.35  # Factor by which the memory peak may grow while the input grows many times
PACKAGES = ("mlflow", "scikit-learn", "pandas", "pyarrow", "deltalake")
RUN = "0" * 32  # A step has a run; its id is written into every row


def work(project: Path, **job: Any) -> dict[str, Any]:
    "Do a job in a separate process and return what it found"
    from project import clean_env

    command = [sys.executable, str(BENCH / "predict.py"), json.dumps(job)]
    env = clean_env(project) | ({"MLFLOW_RUN_ID": RUN} if job["do"] != "prepare" else {})
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"{job}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def verdicts(speeds: list[dict[str, Any]], growth: float, times: int) -> list[str]:
    "Which targets were missed, in words"
    found = [] if all(one["same"] for one in speeds) else ["the probabilities differ from those of the model alone"]
    if (ratio := speeds[-1]["ratio"]) < LEAST:
        found.append(f"batch prediction reaches {ratio:.0%} of the model's own throughput, the target is {LEAST:.0%}")
    if growth > GROWTH:
        found.append(f"{times} times the rows take {growth:.2f} times the memory, the limit is {GROWTH}")
    return found


def comparison(speeds: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> Table:
    "The figures side by side"
    headings = ("flights_predict", "rows", "seconds", "rows/s", "ratio", "peak MB")
    table = figures_table(*headings, names="flights_predict")
    for one, memory in zip(speeds, peaks, strict=True):
        names = {"model": "predict_proba, rows in memory", "batch": "score, lake to lake"}
        for name, words in names.items():
            seconds, peak = one["medians"][name], f"{memory['peak']:,.0f}" if name == "batch" else ""
            ratio = f"{one['medians']['model'] / seconds:.2f}"
            table.add_row(words, f"{one['rows']:,}", f"{seconds:.2f}", f"{one['rows'] / seconds:,.0f}", ratio, peak)
    return table


def medians(speed: dict[str, Any]) -> dict[str, Any]:
    "Add the medians of the turns, and the share of the model's throughput that batch prediction reaches"
    found = {name: statistics.median(turn[name] for turn in speed["taken"]) for name in ("model", "batch", "others")}
    return speed | {"medians": found, "ratio": found["model"] / found["batch"]}


def limits(parts: dict[str, float]) -> str:
    "Where the time goes, in words"
    listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    total, cores = sum(parts.values()), os.cpu_count() or 1
    alone = parts["read"] + parts["screen"] + parts["encode"]
    return (
        f"Each part alone on one core: {listed}; {total:.2f} s in all. {cores} cores need at least "
        f"{max(total / cores, alone):.2f} s: reading, screening and encoding ({alone:.2f} s) run on one thread"
    )


def main(
    months: Annotated[str, typer.Option(help="Months of flights to predict")] = "2013-01..2013-12",
    times: Annotated[int, typer.Option(help="Size of the large table, as a multiple of the small one", min=1)] = 10,
    repeat: Annotated[int, typer.Option(help="Turns of both ways; only the least disturbed ones count", min=1)] = 7,
):
    """Score one table of the lake into another, and let the same model predict rows that are already in memory.

    The model alone is called as a user would, `pipeline.predict_proba(frame)`, with all threads that scikit-learn
    takes by itself. Batch prediction reads, checks, scores and commits. Everything happens in a temporary folder. The
    exit code is 1 if a target is missed. The target for speed is for the large table: the small one takes less than a
    second, a tenth of which goes into opening tables and the first batch.
    """
    console, load = new_console(), [os.getloadavg()]
    tables = {"clean/flights": repeat, "large/flights": max(1, repeat // 2)}
    with scratch() as folder, console.status("Preparing lake and model") as status:
        from mlpkg.testing import settings_text

        (folder / "settings.ini").write_text(settings_text())
        work(folder, do="prepare", wanted=months, times=times)
        load.append(os.getloadavg())
        status.update("Measuring memory")
        peaks = [work(folder, do="memory", table=table) for table in tables]
        load.append(os.getloadavg())
        status.update("Measuring speed")
        speeds = [medians(work(folder, do="speed", table=table, repeat=n)) for table, n in tables.items()]
        load.append(os.getloadavg())
    growth = peaks[1]["peak"] / peaks[0]["peak"]
    faults = verdicts(speeds, growth, times)
    console.print(comparison(speeds, peaks))
    for one, turns in zip(speeds, tables.values(), strict=True):
        taken = {name: [turn[name] for turn in one["taken"]] for name in ("model", "batch", "others")}
        spread = {name: f"{min(values):.2f} to {max(values):.2f}" for name, values in taken.items()}
        console.print(
            f"\n{one['rows']:,} rows: medians of {turns} turns; predict_proba took {spread['model']} s, score "
            f"{spread['batch']} s, others {spread['others']} cores; same probabilities: {one['same']}"
        )
        console.print(limits(one["parts"]))
    console.print(f"\n{times} times the rows take {growth:.2f} times the memory")
    print_load(console, load, "at the start, after each stage")
    record = {
        "options": {"months": months, "times": times, "repeat": repeat}, "load_average": load,
        "machine": machine(*PACKAGES), "speed": speeds, "memory": peaks, "growth": growth,
    }  # fmt: skip
    finish(console, "batch", record, faults)


if __name__ == "__main__":
    run(main)
