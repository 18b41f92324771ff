"""What does a step cost beside an empty task and a plain script, with imports made for each step or once?

Chains of notebooks, trivial ones and ones that import what most notebooks do, in one process and under Airflow's own
scheduler; `cold` is how Airflow, papermill and Jupyter do it, `warm` is how this project sets them up.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from jupyter_client.manager import KernelManager
from measure import (
    BENCH,
    CommandError,
    figures_table,
    finish,
    machine,
    measure,
    memory_mb,
    new_console,
    print_load,
    run,
    scratch,
)  # fmt: skip
from scheduler import running

USUAL = """\
import matplotlib.pyplot as plt
import mlflow
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier

from mlpkg.data.lake import open_lake
"""
NOTEBOOKS = {"trivial": "x = 1", "usual": USUAL}
PACKAGES = ("apache-airflow", "apache-airflow-providers-papermill", "papermill", "mlflow", "ipykernel")
COLD = {"MLPKG_KERNELS__WARM": "no", "MLPKG_AIRFLOW__PRELOAD": ""}
WARM = {"MLPKG_KERNELS__WARM": "yes", "MLPKG_KERNELS__IDLE": "300"}
LOOP = "import papermill; [papermill.execute_notebook({0!r}, {1!r}, progress_bar=False) for _ in range({2})]"


@dataclass(frozen=True)
class Way:
    "A way to run a chain of notebooks"

    name: str
    kind: str  # script, papermill, or the first word of a DAG's name
    env: dict[str, str]


IN_PROCESS = [
    Way("plain script", "script", COLD),
    Way("papermill, cold", "papermill", COLD),
    Way("papermill, warm", "papermill", WARM),
    Way("empty tasks, mlpkg run", "empty", WARM),
    Way("stock operator, mlpkg run, cold", "stock", COLD),
    Way("stock operator, mlpkg run, warm", "stock", WARM),
    Way("mlpkg run, cold", "ours", COLD),
    Way("mlpkg run, warm", "ours", WARM),
]
SCHEDULED = [("empty tasks", "empty"), ("stock operator", "stock"), ("mlpkg", "ours")]


def dag_name(kind: str, notebook: str, count: int) -> str:
    "The DAG of bench/dags/steps.py"
    return f"{kind}_{'nothing' if kind == 'empty' else notebook}_{count}"


def make_project(base: Path, counts: list[int]) -> dict[str, str]:
    "A project with the notebooks and the DAGs; returns the environment that commands need"
    from project import clean_env, prepare_stores

    prepare_stores(base, (BENCH / "dags" / "steps.py",))
    (base / "notebooks").mkdir()
    (base / "var" / "out").mkdir()
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    for name, code in NOTEBOOKS.items():
        parameters = nbformat.v4.new_code_cell("seed: int = 0  # Unused", metadata={"tags": ["parameters"]})
        cells = [parameters, nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), base / "notebooks" / f"{name}.ipynb")
    # Templates of a previous benchmark, or of the user, must not help
    (base / "run").mkdir(mode=0o700)
    steps = ",".join(map(str, counts))
    return clean_env(base) | {"XDG_RUNTIME_DIR": str(base / "run"), "BENCH_STEPS": steps}


def command(way: Way, notebook: str, count: int) -> list[str]:
    "What runs a chain"
    if way.kind == "script":
        return [sys.executable, "-c", f"{NOTEBOOKS[notebook]}\n" * count]
    if way.kind == "papermill":
        return [sys.executable, "-c", LOOP.format(f"notebooks/{notebook}.ipynb", f"var/out/{notebook}.ipynb", count)]
    return [sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", dag_name(way.kind, notebook, count)]


Figures = dict[tuple[str, str, int], list[float]]  # Way, notebook and number of steps -> seconds of each run


def in_process(base: Path, env: dict[str, str], counts: list[int], repeat: int, tell) -> Figures:
    "Each way in turn, as often as asked for; before that once with nothing measured, which starts the template"
    found: Figures = {}
    measure(command(IN_PROCESS[-1], "usual", counts[0]), base, env | WARM, base / "output.log")
    wait_for_template(base)
    for turn in range(repeat):
        for notebook in NOTEBOOKS:
            for count in counts:
                for way in IN_PROCESS:
                    tell(f"run {turn + 1} of {repeat}: {count} {notebook} steps, {way.name}")
                    taken = measure(command(way, notebook, count), base, env | way.env, base / "output.log")
                    found.setdefault((way.name, notebook, count), []).append(taken.seconds)
    return found


def wait_for_template(base: Path, seconds: float = 120) -> None:
    "Wait until a kernel can be forked"
    end = time.monotonic() + seconds
    while not any(path.is_socket() for path in (base / "run").glob("*/*")):
        if time.monotonic() > end:
            raise CommandError("there is no template: is kernels.warm on, and `mlpkg kernels install` done?")
        time.sleep(0.2)


def scheduled(base: Path, env: dict[str, str], counts: list[int], repeat: int, tell) -> Figures:
    "The same under a scheduler, once started cold and once warm"
    found: Figures = {}
    dags = {dag_name(kind, notebook, count) for _, kind in SCHEDULED for notebook in NOTEBOOKS for count in counts}
    for words, more in (("cold", COLD), ("warm", WARM)):
        tell(f"starting Airflow, {words}")
        with running(base, env | more, dags) as airflow:
            for kind in ("empty", "stock", "ours"):
                airflow.run(dag_name(kind, "usual", counts[0]))
            for turn in range(repeat):
                for notebook in NOTEBOOKS:
                    for count in counts:
                        for name, kind in SCHEDULED:
                            tell(f"run {turn + 1} of {repeat}: {count} {notebook} steps, {name}, {words}")
                            taken = airflow.run(dag_name(kind, notebook, count))
                            found.setdefault((f"{name}, {words}", notebook, count), []).append(taken)
    return found


READY = "import os, resource; print(os.getpid())"


def eight_kernels(base: Path, env: dict[str, str], code: str = USUAL) -> float:
    "Memory of eight kernels at once that have made the usual imports, and of their template, in MB"
    saved = dict(os.environ)
    os.environ.update(env)
    managers = [KernelManager(kernel_name="python3") for _ in range(8)]
    try:
        for manager in managers:
            manager.start_kernel(cwd=str(base))
            client = manager.client()
            client.start_channels()
            client.wait_for_ready(timeout=120)
            client.execute_interactive(code, timeout=300)
            client.stop_channels()
        roots = [manager.provisioner.process.pid for manager in managers]
        return sum(map(memory_mb, [*roots, *templates(base)]))
    finally:
        for manager in managers:
            manager.shutdown_kernel(now=True)
        os.environ.clear()
        os.environ.update(saved)


def templates(base: Path) -> list[int]:
    "Processes of the templates of this benchmark"
    from mlpkg.cli.kernels import running_templates

    return [one["pid"] for one in running_templates()] if any((base / "run").iterdir()) else []


def end_templates(env: dict[str, str]) -> None:
    "End the templates that were started here"
    os.environ["XDG_RUNTIME_DIR"] = env["XDG_RUNTIME_DIR"]
    from mlpkg.cli.kernels import stop_command

    stop_command(all_=True)


def table(found: Figures, notebook: str, counts: list[int], reference: dict[int, float], title: str):
    "Seconds of each chain, and what a step takes more than the reference"
    shown = figures_table(title, *(f"{count} steps" for count in counts), "s/step more", names=title)
    for name in dict.fromkeys(way for way, _, _ in found):
        middle = {count: statistics.median(found[name, notebook, count]) for count in counts}
        most = counts[-1]
        more = (middle[most] - reference[most]) / most
        shown.add_row(name, *(f"{middle[count]:.1f}" for count in counts), f"{more:.2f}")
    return shown


def main(
    steps: Annotated[list[int], typer.Option(help="Lengths of the chains; repeat for each")] = [4],  # noqa: B006
    repeat: Annotated[int, typer.Option(help="Runs of each, interleaved; medians are shown", min=1)] = 5,
):
    """Run chains of notebooks in all ways side by side; compare what a step costs.

    Everything happens in a temporary folder, with an Airflow and stores of its own.
    """
    console, load, counts = new_console(), [os.getloadavg()], sorted(steps)
    with scratch() as folder, console.status("Preparing stores") as status:
        env = make_project(folder / "base", counts)
        try:
            local = in_process(folder / "base", env, counts, repeat, status.update)
            load.append(os.getloadavg())
            airflow = scheduled(folder / "base", env, counts, repeat, status.update)
            load.append(os.getloadavg())
            status.update("Measuring the memory of eight kernels")
            memory = {"cold": eight_kernels(folder / "base", env | COLD)}
            memory["warm"] = eight_kernels(folder / "base", env | WARM)
        finally:
            end_templates(env)
    for notebook in NOTEBOOKS:
        plain = {count: statistics.median(local["plain script", notebook, count]) for count in counts}
        empty = {count: statistics.median(airflow["empty tasks, warm", notebook, count]) for count in counts}
        console.print(table(local, notebook, counts, plain, f"{notebook} notebooks, one process"), "\n")
        console.print(table(airflow, notebook, counts, empty, f"{notebook} notebooks, scheduler"), "\n")
    console.print("s/step more: than the plain script in one process, than empty tasks (warm) under the scheduler")
    console.print(
        f"eight kernels at once: {memory['cold']:,.0f} MB cold, {memory['warm']:,.0f} MB warm, template included"
    )
    print_load(console, load, "at the start, after one process, after the scheduler")
    figures = {" | ".join(map(str, key)): value for key, value in (local | airflow).items()}
    record = {"steps": counts, "repeat": repeat, "machine": machine(*PACKAGES), "seconds": figures, "memory_mb": memory}
    finish(console, "steps", json.loads(json.dumps(record)), [])


if __name__ == "__main__":
    run(main)
