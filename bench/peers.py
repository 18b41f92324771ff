"""What does a step cost with other tools, each in an environment of its own and used as its documentation says?

Chains of steps that import what most notebooks do. The tools differ in what a step is: a process of its own, or a
function in a process that has the imports already, so that steps can get in each other's way.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from measure import CommandError, figures_table, finish, machine, measure, new_console, print_load, run, scratch

LIBRARIES = ("matplotlib", "mlflow", "pandas", "scikit-learn", "ipykernel")
USUAL = """\
import matplotlib.pyplot as plt
import mlflow
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
"""
INDENTED = USUAL.replace("\n", "\n        ").rstrip()
PAPERMILL = """\
import papermill
for _ in range({steps}):
    papermill.execute_notebook("usual.ipynb", "out.ipynb", progress_bar=False)
"""
PLOOMBER = """\
from ploomber_engine import execute_notebook
for _ in range({steps}):
    execute_notebook("usual.ipynb", "out.ipynb")
"""
MARIMO = f"""\
import marimo
app = marimo.App()

@app.cell
def _():
        {INDENTED}
        return

if __name__ == "__main__":
    app.run()
"""
METAFLOW = """\
from metaflow import FlowSpec, step

class Chain(FlowSpec):
    @step
    def start(self):
        self.next(self.step_0)

{chain}
    @step
    def end(self):
        pass

if __name__ == "__main__":
    Chain()
"""
METAFLOW_STEP = f"""\
    @step
    def step_{{place}}(self):
        {INDENTED}
        self.next(self.{{after}})

"""
KEDRO = f"""\
from kedro.io import DataCatalog
from kedro.pipeline import node, pipeline
from kedro.runner import SequentialRunner

def load(before=None):
        {INDENTED}
        return 1

chain = [node(load, [f"out_{{{{place - 1}}}}"] if place else None, f"out_{{{{place}}}}") for place in range({{steps}})]
SequentialRunner().run(pipeline(chain), DataCatalog())
"""
DAGSTER = """\
from dagster import Definitions, In, Nothing, Out, job
from dagstermill import ConfigurableLocalOutputNotebookIOManager, define_dagstermill_op

ops = [
    define_dagstermill_op(f"step_{{place}}", "usual.ipynb", output_notebook_name=f"out_{{place}}",
                          ins={{"start": In(Nothing)}} if place else None)
    for place in range({steps})
]

@job(resource_defs={{"output_notebook_io_manager": ConfigurableLocalOutputNotebookIOManager()}})
def chain():
    done = ops[0]()
    for op in ops[1:]:
        done = op(start=done)

if __name__ == "__main__":
    assert chain.execute_in_process().success
"""


@dataclass(frozen=True)
class Peer:
    "A tool, and how a chain of steps is run with it"

    name: str
    packages: tuple[str, ...]
    files: Callable[[int], dict[str, str]]  # Number of steps -> name and content of files
    command: Callable[[str, int], str]  # Folder of executables and number of steps -> shell command
    step: str  # What a step is


def stage(place: int) -> str:
    "A stage of a DVC pipeline that depends on the one before"
    before = f"    deps: [out_{place - 1}]\n" if place else ""
    return f"  step_{place}:\n    cmd: python usual.py && touch out_{place}\n{before}    outs: [out_{place}]\n"


def metaflow(steps: int) -> dict[str, str]:
    "A flow of so many steps between start and end"
    after = [*(f"step_{place}" for place in range(1, steps)), "end"]
    chain = "".join(METAFLOW_STEP.format(place=place, after=name) for place, name in enumerate(after))
    return {"flow.py": METAFLOW.format(chain=chain)}


def script(text: str) -> Callable[[int], dict[str, str]]:
    "One file, `chain.py`"
    return lambda steps: {"chain.py": text.format(steps=steps)}


def python(folder: str, steps: int) -> str:
    "Run it"
    return f"{folder}/python chain.py"


PEERS = [
    Peer("plain script", LIBRARIES, lambda steps: {"chain.py": USUAL * steps}, python, "lines of one process"),
    Peer("papermill", (*LIBRARIES, "papermill"), script(PAPERMILL), python, "a kernel, cold"),
    Peer("ploomber-engine", (*LIBRARIES, "ploomber-engine"), script(PLOOMBER), python, "cells in one process"),
    Peer(
        "marimo, as a script", (*LIBRARIES, "marimo"), lambda steps: {"app.py": MARIMO},
        lambda folder, steps: " && ".join([f"{folder}/python app.py"] * steps), "a process",
    ),
    Peer(
        "dagstermill", (*LIBRARIES, "dagstermill", "dagster"), script(DAGSTER), python, "a kernel, cold",
    ),
    Peer(
        "Metaflow", (*LIBRARIES, "metaflow"), metaflow,
        lambda folder, steps: f"{folder}/python flow.py --quiet run", "a process",
    ),
    Peer("Kedro", (*LIBRARIES, "kedro"), script(KEDRO), python, "a function in one process"),
    Peer(
        "DVC", (*LIBRARIES, "dvc"),
        lambda steps: {"usual.py": USUAL, "dvc.yaml": "stages:\n" + "".join(map(stage, range(steps)))},
        lambda folder, steps: f"rm -f .dvc/tmp/lock dvc.lock out_* && {folder}/dvc repro --quiet --no-run-cache",
        "a process",
    ),
    Peer(
        "DVC, nothing has changed", (*LIBRARIES, "dvc"), lambda steps: {},
        lambda folder, steps: f"{folder}/dvc repro --quiet", "nothing",
    ),
]  # fmt: skip


def make_environment(folder: Path, packages: tuple[str, ...], log: Path) -> Path:
    "An environment with these packages; the folder of its executables"
    if not folder.exists():
        uv = str(Path(sys.executable).parent / "uv")
        measure([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], Path.cwd(), dict(os.environ), log)
        install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(folder / "bin/python")]
        measure([*install, *packages], Path.cwd(), dict(os.environ), log)
    return folder / "bin"


def versions(folder: Path, packages: tuple[str, ...]) -> dict[str, str]:
    "What was installed"
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([folder / "python", "-c", code, *packages], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def prepare(project: Path, peer: Peer, steps: int, env: dict[str, str]) -> None:
    "Write what a chain needs"
    project.mkdir(exist_ok=True)
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(USUAL)], metadata=spec), project / "usual.ipynb"
    )
    for name, text in peer.files(steps).items():
        (project / name).write_text(text)
    if "dvc.yaml" in peer.files(steps) and not (project / ".dvc").exists():
        subprocess.run(["dvc", "init", "--no-scm", "--quiet"], cwd=project, env=env, check=True)


def main(
    steps: Annotated[int, typer.Option(help="Length of the chains")] = 4,
    repeat: Annotated[int, typer.Option(help="Runs of each, interleaved; medians are shown", min=1)] = 3,
    peer: Annotated[list[str], typer.Option(help="Only these; repeat for each")] = [],  # noqa: B006
):
    """Run chains of steps with other tools; compare what a step takes more than the plain script.

    Each tool is installed into an environment of its own in a temporary folder. One that cannot be had is named.
    """
    console, load = new_console(), [os.getloadavg()]
    taken: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    installed: dict[str, dict[str, str]] = {}
    chosen = [one for one in PEERS if not peer or one.name in peer or one is PEERS[0]]
    with scratch() as folder, console.status("Installing") as status:
        log, usable = folder / "output.log", []
        for one in chosen:
            status.update(f"Installing {one.name}")
            tools, project = folder / one.packages[-1], folder / f"{one.packages[-1]}-project"
            env = dict(os.environ) | {"PATH": f"{tools / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
            env |= {"USERNAME": "bench", "DAGSTER_HOME": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
            try:
                bin_folder = make_environment(tools, one.packages, log)
                prepare(project, one, steps, env)
                command = ["bash", "-ec", one.command(str(bin_folder), steps)]
                measure(command, project, env, log)  # bytecode compiled, caches filled
                usable.append((one, command, project, env))
                installed[one.name] = versions(bin_folder, one.packages)
            except CommandError as error:
                missing[one.name] = str(error).splitlines()[-1]
        for turn in range(repeat):
            for one, command, project, env in usable:
                status.update(f"run {turn + 1} of {repeat}: {one.name}")
                taken.setdefault(one.name, []).append(measure(command, project, env, log).seconds)
    load.append(os.getloadavg())
    plain = statistics.median(taken["plain script"])
    table = figures_table(f"{steps} steps", "s", "s/step more", "a step is", names=f"{steps} steps")
    for one, *_ in usable:
        middle = statistics.median(taken[one.name])
        table.add_row(one.name, f"{middle:.1f}", f"{(middle - plain) / steps:.2f}", one.step)
    console.print(table)
    for name, why in missing.items():
        console.print(f"{name} is left out: {why}")
    print_load(console, load, "at the start, at the end")
    record = {"steps": steps, "repeat": repeat, "machine": machine(), "seconds": taken, "installed": installed}
    finish(console, "peers", record | {"missing": missing, "load_average": load}, [])


if __name__ == "__main__":
    run(main)
