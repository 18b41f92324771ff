"""What does training through recorded notebook steps cost, compared with stock operators, papermill and a script?"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from measure import BENCH, Measurement, figures_table, finish, machine, measure, new_console, print_load, run, scratch
from rich.table import Table

CANDIDATES = ("logistic_regression", "random_forest", "hist_gradient_boosting")
NOISE = 0.10  # Share by which mlpkg may be slower than stock operators, see `verdicts`
BUSY = 0.25  # Cores that other processes may take before their share spoils the wall time
PACKAGES = ("apache-airflow", "apache-airflow-providers-papermill", "papermill", "mlflow", "scikit-learn")
HELP_LIMIT, IMPORT_LIMIT = 0.5, 0.3  # Seconds
STOCK = "from airflow.providers.papermill.operators.papermill import PapermillOperator"


@dataclass(frozen=True)
class Variant:
    "A way to run the pipeline"

    name: str
    command: list[str]
    dag: Path | None = None  # The DAG file of its project
    plain_mlflow: bool = True  # Does it need MLFLOW_TRACKING_URI to know where to log?


def variants(candidates: list[str], budget: int, seed: int) -> list[Variant]:
    "The ways to compare, all given the same work"
    job = json.dumps({"candidates": candidates, "budget": budget, "seed": seed})
    params = [f"candidates={','.join(candidates)}", f"budget={budget}", f"seed={seed}"]
    mlpkg = [sys.executable, "-c", "from mlpkg.cli.start import main; main()", "run", "flights_train"]
    for param in params:
        mlpkg += ["--param", param]
    ours = BENCH.parent / "dags" / "flights_train.py"
    scripts = {name: [sys.executable, str(BENCH / f"{name}.py"), job] for name in ("stock", "loop", "plain")}
    return [
        Variant("mlpkg run", mlpkg, ours, plain_mlflow=False),
        Variant("mlpkg run, one by one", [*mlpkg, "--jobs", "1"], ours, plain_mlflow=False),
        Variant("stock operators", scripts["stock"], BENCH / "dags" / "flights_stock.py"),
        Variant("papermill loop", scripts["loop"]),
        Variant("plain script", scripts["plain"]),
    ]


def run_variant(variant: Variant, base: Path, project: Path) -> tuple[Measurement, dict[str, str]]:
    "Measure a variant in a fresh project, removed afterwards; return what it took and what it found"
    from project import clean_env, copy, outcome

    copy(base, project, variant.dag)
    env = clean_env(project)
    if variant.plain_mlflow:
        env["MLFLOW_TRACKING_URI"] = f"sqlite:///{project}/var/mlflow.db"
    measured = measure(variant.command, project, env, project / "output.log")
    found = outcome(project)
    shutil.rmtree(project)
    return measured, found


def seconds(code: list[str], env: dict[str, str]) -> float:
    "Wall time of a Python process"
    begin = time.perf_counter()
    subprocess.run([sys.executable, *code], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


# What a worker pays on top of the provider: measured in one process, since two of them differ by more than the result.
IMPORTS = f"""
import time
begin = time.perf_counter()
{STOCK}
middle = time.perf_counter()
import mlpkg.airflow.dags
print(middle - begin, time.perf_counter() - middle)
"""


def start_up(env: dict[str, str], times: int) -> dict[str, float]:
    "Medians of the start of the command line, of importing the provider, and of what importing mlpkg.airflow.dags adds"
    taken: dict[str, list[float]] = {"help": [], "import provider": [], "import added": []}
    for _ in range(times):
        taken["help"].append(seconds(["-c", "from mlpkg.cli.start import main; main()", "--help"], env))
        done = subprocess.run([sys.executable, "-c", IMPORTS], env=env, check=True, capture_output=True, text=True)
        provider, added = done.stdout.splitlines()[-1].split()
        taken["import provider"].append(float(provider))
        taken["import added"].append(float(added))
    return {name: statistics.median(values) for name, values in taken.items()}


def medians(measured: list[Measurement]) -> dict[str, float]:
    "The median of each figure"
    return {name: statistics.median(asdict(one)[name] for one in measured) for name in asdict(measured[0])}


def slower(ours: dict[str, float], stock: dict[str, float], noise: float) -> str:
    """A message if mlpkg takes longer than stock operators; empty if it does not.

    Processor times of the same run differ by about 3 percent, wall times by a little more, so a single run of each can
    show a difference of 10 percent. If other processes disturbed one of the two, processor time is compared instead.
    """
    disturbed = max(ours["others"], stock["others"]) > BUSY
    key, unit = ("cpu_seconds", "s of processor time") if disturbed else ("seconds", "s")
    if ours[key] <= stock[key] * (1 + noise):
        return ""
    return f"mlpkg run took {ours[key]:.1f} {unit}, stock operators {stock[key]:.1f}: more than {noise:.0%} slower"


def verdicts(results: dict[str, dict[str, float]], starts: dict[str, float], noise: float) -> list[str]:
    "Which limits were exceeded, in words"
    found, gap = [], starts["import added"]
    if fault := slower(results["mlpkg run"], results["stock operators"], noise):
        found.append(fault)
    if starts["help"] >= HELP_LIMIT:
        found.append(f"mlpkg --help took {starts['help']:.2f} s, the limit is {HELP_LIMIT} s")
    if gap >= IMPORT_LIMIT:
        found.append(
            f"importing mlpkg.airflow.dags takes {gap:.2f} s more than the provider, the limit is {IMPORT_LIMIT} s"
        )
    return found


def comparison(results: dict[str, dict[str, float]], steps: int) -> Table:
    "The figures side by side"
    plain = results["plain script"]["seconds"]
    headings = ("flights_train", "seconds", "cpu s", "peak MB", "ratio", "s/step", "steps", "others")
    table = figures_table(*headings, names="flights_train")
    for name, figures in results.items():
        row = [f"{figures['seconds']:.1f}", f"{figures['cpu_seconds']:.1f}", f"{figures['peak_mb']:,.0f}"]
        row += [f"{figures['seconds'] / plain:.2f}", f"{(figures['seconds'] - plain) / steps:.2f}", str(steps)]
        row += [f"{figures['others']:.1f}"]
        table.add_row(name, *row)
    return table


def same_work(found: dict[str, list[dict[str, str]]]) -> list[str]:
    "A message for each figure in which variants differ"
    every = [(name, one) for name, several in found.items() for one in several]
    first_name, first = every[0]
    return [
        f"{name} found {key} {one.get(key)}, but {first_name} {first.get(key)}: they did different work"
        for name, one in every[1:]
        for key in sorted(first.keys() | one.keys())
        if one.get(key) != first.get(key)
    ]


def main(
    months: Annotated[str, typer.Option(help="Months of flights to train on")] = "2013-01..2013-04",
    candidate: Annotated[list[str], typer.Option(help="Model to try; repeat for each")] = list(CANDIDATES),  # noqa: B006
    budget: Annotated[int, typer.Option(help="Trials of the search for each candidate", min=0)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn at random")] = 0,
    repeat: Annotated[int, typer.Option(help="Runs of each variant, interleaved", min=1)] = 1,
    noise: Annotated[float, typer.Option(help="Share by which mlpkg may be slower than stock", min=0)] = NOISE,
):
    """Train through mlpkg, stock operators, papermill in a loop and a plain script; compare time and memory.

    Everything happens in a temporary folder. The exit code is 1 if the variants do not find exactly the same,
    or if mlpkg is slower than its limits allow.
    """
    console, load = new_console(), [os.getloadavg()]
    ways, steps = variants(candidate, budget, seed), len(candidate) + 2
    measured: dict[str, list[Measurement]] = {way.name: [] for way in ways}
    found: dict[str, list[dict[str, str]]] = {way.name: [] for way in ways}
    with scratch() as folder, console.status("Preparing lake and stores") as status:
        from project import clean_env, prepare

        rows = prepare(folder / "base", months)
        status.update("Measuring start-up")
        starts = start_up(clean_env(folder / "base"), times=5)
        load.append(os.getloadavg())
        for turn in range(repeat):
            for way in ways:
                status.update(f"Run {turn + 1} of {repeat}: {way.name}")
                measurement, outcome = run_variant(way, folder / "base", folder / "project")
                measured[way.name].append(measurement)
                found[way.name].append(outcome)
                load.append(os.getloadavg())
    results, different = {name: medians(several) for name, several in measured.items()}, same_work(found)
    faults = different + verdicts(results, starts, noise)
    console.print(comparison(results, steps))
    console.print(
        "ratio and overhead per step (s/step) relative to the plain script; others: cores taken by other processes"
    )
    console.print(f"\n{rows:,} flights of {months}, {', '.join(candidate)}, budget {budget}, median of {repeat}")
    if not different:
        auc = found["plain script"][0]["metric.roc_auc"]
        console.print(f"Holdout ROC AUC in every variant: {auc}")
    console.print(words(starts))
    print_load(console, load, "at the start, after start-up, after each run")
    record = {
        "options": {"months": months, "candidates": candidate, "budget": budget, "seed": seed, "repeat": repeat},
        "flights": rows, "steps": steps, "machine": machine(*PACKAGES), "load_average": load, "results": results,
        "runs": {name: [asdict(one) for one in several] for name, several in measured.items()},
        "start_up_seconds": starts, "found": found, "noise": noise,
    }  # fmt: skip
    finish(console, "train", record, faults)


def words(starts: dict[str, float]) -> str:
    "How long it takes to start"
    return (
        f"mlpkg --help {starts['help']:.2f} s (limit {HELP_LIMIT} s); import of PapermillOperator "
        f"{starts['import provider']:.2f} s, of mlpkg.airflow.dags {starts['import added']:.2f} s more "
        f"(limit {IMPORT_LIMIT} s); medians of 5"
    )


if __name__ == "__main__":
    run(main)
