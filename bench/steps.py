"""What does a step cost beside an empty task and a plain script, with imports made for each step or once?

Chains of notebooks, trivial ones and ones that import what most notebooks do, in one process and under Airflow's own
scheduler; `cold` is how Airflow, papermill and Jupyter do it, `warm` is how this project sets them up.
"""

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
from scheduler import Celery, running

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
MLPKG = [sys.executable, "-c", "from mlpkg.cli.start import main; main()"]
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


GROWING = [IN_PROCESS[0], IN_PROCESS[3], IN_PROCESS[7]]  # Script, empty tasks, and ours as it is set up
CACHED = 10  # Steps; two more tasks open and close the run


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
    return [*MLPKG, "run", dag_name(way.kind, notebook, count)]


Figures = dict[tuple[str, str, int], list[float]]  # Way, notebook and number of steps -> seconds of each run


def in_process(base: Path, env: dict[str, str], count: int, repeat: int, tell) -> Figures:
    "Each way in turn, as often as asked for; before that once with nothing measured, which starts the template"
    found: Figures = {}
    measure(command(IN_PROCESS[-1], "usual", count), base, env | WARM, base / "output.log")
    wait_for_template(base)
    for turn in range(repeat):
        for notebook in NOTEBOOKS:
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


def growth(base: Path, env: dict[str, str], counts: list[int], tell) -> Figures:
    "Chains of other lengths, once each"
    found: Figures = {}
    for count in counts:
        for way in GROWING:
            tell(f"{count} trivial steps, {way.name}")
            taken = measure(command(way, "trivial", count), base, env | way.env, base / "output.log")
            found[way.name, "trivial", count] = [taken.seconds]
    return found


def cached(base: Path, env: dict[str, str], repeat: int, tell) -> dict[str, list[float]]:
    "A DAG of which nothing has changed, beside one whose tasks are empty; seconds of each run"
    found: dict[str, list[float]] = {"empty": [], "cached": []}
    lengths = {"empty": CACHED + 2, "cached": CACHED}  # As many tasks
    chain = {kind: command(Way("", kind, WARM), "usual", length) for kind, length in lengths.items()}
    tell(f"{CACHED} steps for the first time")
    measure(chain["cached"], base, env | WARM, base / "output.log")
    for turn in range(repeat):
        for kind in found:
            tell(f"run {turn + 1} of {repeat}: {lengths[kind]} tasks, {kind}")
            found[kind].append(measure(chain[kind], base, env | WARM, base / "output.log").seconds)
    return found


def scheduled(
    base: Path, env: dict[str, str], count: int, repeat: int, celery: Celery | None, tell
) -> Figures:  # fmt: skip
    "The same under a scheduler, once started cold and once warm"
    found: Figures = {}
    dags = {dag_name(kind, notebook, count) for _, kind in SCHEDULED for notebook in NOTEBOOKS}
    env = env | {"BENCH_STEPS": str(count)}  # each task reads its DAG file: it holds no chains that are not run here
    for words, more in (("cold", COLD), ("warm", WARM)):
        tell(f"starting Airflow, {words}")
        with running(base, env | more, dags, celery) as airflow:
            for kind in ("empty", "stock", "ours"):
                airflow.run(dag_name(kind, "usual", count))
            for turn in range(repeat):
                for notebook in NOTEBOOKS:
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
        warm = env["MLPKG_KERNELS__WARM"] == "yes"  # a template that is left over is not part of cold kernels
        return sum(map(memory_mb, [*roots, *(templates(base) if warm else ())]))
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


def table(found: Figures, notebook: str, count: int, reference: str, title: str):
    "Median seconds of each chain, how they scatter, and what a step takes more than one of the reference"
    shown = figures_table(title, "s", "from", "to", "s/step more", names=title)
    middle = statistics.median(found[reference, notebook, count])
    for name in dict.fromkeys(way for way, _, _ in found):
        taken = found[name, notebook, count]
        more = (statistics.median(taken) - middle) / count
        shown.add_row(
            name, *(f"{one:.1f}" for one in (statistics.median(taken), min(taken), max(taken))), f"{more:.2f}"
        )
    return shown


def growth_table(found: Figures, counts: list[int]):
    "Seconds of chains of different lengths, and what a further step takes"
    title = "trivial steps, one process"
    shown = figures_table(title, *map(str, counts), "s for a further step", names=title)
    for name in dict.fromkeys(way for way, _, _ in found):
        taken = [statistics.median(found[name, "trivial", count]) for count in counts]
        slope = (taken[-1] - taken[0]) / (counts[-1] - counts[0])
        shown.add_row(name, *(f"{one:.1f}" for one in taken), f"{slope:.2f}")
    return shown


def main(
    steps: Annotated[int, typer.Option(help="Length of the chains")] = 4,
    repeat: Annotated[int, typer.Option(help="Runs of each, interleaved; medians are shown", min=1)] = 5,
    grow: Annotated[list[int], typer.Option(help="Other lengths, once each; repeat for each")] = [10, 100],  # noqa: B006
    broker: Annotated[str, typer.Option(help="For Celery: redis://host:port/number", envvar="VALKEY_URL")] = "",
    database: Annotated[str, typer.Option(help="For Celery: postgresql://...", envvar="DATABASE_URL")] = "",
):
    """Run chains of notebooks in all ways side by side; compare what a step costs.

    Everything happens in a temporary folder, with an Airflow and stores of its own. Celery takes part where a broker
    and a database are named.
    """
    console, load = new_console(), [os.getloadavg()]
    celery = Celery(broker, database) if broker and database else None
    executors = {"LocalExecutor": None} | ({"Celery, 2 workers": celery} if celery else {})
    with scratch() as folder, console.status("Preparing stores") as status:
        base = folder / "base"
        env = make_project(base, sorted({steps, CACHED, CACHED + 2, *grow}))
        try:
            local = in_process(base, env, steps, repeat, status.update)
            longer = growth(base, env, grow, status.update)
            unchanged = cached(base, env, repeat, status.update)
            load.append(os.getloadavg())
            airflow = {name: scheduled(base, env, steps, repeat, one, status.update) for name, one in executors.items()}
            load.append(os.getloadavg())
            status.update("Measuring the memory of eight kernels")
            memory = {words: eight_kernels(base, env | more) for words, more in (("cold", COLD), ("warm", WARM))}
        finally:
            end_templates(env)
    for notebook in NOTEBOOKS:
        title = f"{steps} {notebook} notebooks"
        console.print(table(local, notebook, steps, "plain script", f"{title}, one process"), "\n")
        for name, found in airflow.items():
            console.print(table(found, notebook, steps, "empty tasks, warm", f"{title}, {name}"), "\n")
    console.print("s/step more: than the plain script in one process, than empty tasks (warm) under a scheduler")
    if not celery:
        console.print("Celery is left out: name --broker and --database")
    shortest = {(way.name, "trivial", steps): local[way.name, "trivial", steps] for way in GROWING}
    console.print(growth_table(shortest | longer, sorted({steps, *grow})), "\n")
    more = statistics.median(unchanged["cached"]) - statistics.median(unchanged["empty"])
    console.print(f"{CACHED} unchanged steps take {more:.1f} s more than as many empty tasks, in one process")
    console.print(
        f"eight kernels at once: {memory['cold']:,.0f} MB cold, {memory['warm']:,.0f} MB warm, template included"
    )
    print_load(console, load, "at the start, after one process, after the schedulers")
    record = {
        "steps": steps, "repeat": repeat, "machine": machine(*PACKAGES), "load_average": load,
        "seconds": {"one process": named(local | longer), **{name: named(found) for name, found in airflow.items()}},
        "unchanged": unchanged, "memory_mb": memory,
    }  # fmt: skip
    finish(console, "steps", record, [])


def named(found: Figures) -> dict[str, list[float]]:
    "Figures as JSON has them"
    return {" | ".join(map(str, key)): values for key, values in found.items()}


if __name__ == "__main__":
    run(main)
