"""Do the tests bite? Code that decides is changed a little, in one place at a time, and a test has to fail.

The changes are cosmic-ray's: another operator, another number, a condition turned around. From the places of each
module a sample is drawn, with a seed. Each change is tried in a clone of the last commit, first on the examples of the
module's page, then on the tests named here, until one fails; if none does, the change has survived. Survivors that
have been looked at are listed with a reason in `bench/mutants.json`. They count as survivors all the same.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import typer
from measure import BENCH, CommandError, figures_table, measure, new_console, scratch
from peers import make_environment
from rich.progress import Progress

ROOT, REASONS, TOOL = BENCH.parent, BENCH / "mutants.json", "cosmic-ray==8.7.0"
TESTS = {  # Module -> what is given to pytest, besides the examples of its page
    "models/intervals": [],
    "models/trials": ["tests/test_answers.py", "-k", "equal_models or lost or arms"],
    "models/evaluation": ["tests/test_promotion.py"],
    "models/comparison": ["tests/test_promotion.py", "tests/test_registry.py"],
    "models/promotion": ["tests/test_promotion.py"],
    "models/registry": ["tests/test_registry.py", "tests/test_promotion.py"],
    "monitoring/drift": ["tests/test_monitoring.py"],
    "monitoring/dealing": ["tests/test_monitoring.py"],
    "monitoring/windows": ["tests/test_monitoring.py"],
    "monitoring/checks": ["tests/test_monitoring.py"],
    "monitoring/performance": ["tests/test_monitoring.py"],
    "monitoring/estimation": ["tests/test_monitoring.py"],
    "monitoring/verdict": ["tests/test_monitoring.py"],
    "serving/comparison": ["tests/test_answers.py", "-k", "arms or shadow or truth_that or equal_models or lost"],
    "serving/arms": ["tests/test_answers.py", "-k", "arms or arm or trial"],
    "serving/batching": ["tests/test_serving.py"],
    "serving/loader": ["tests/test_serving.py"],
    "steps/outbox": ["tests/test_outbox.py"],
}
CONFIG = """[cosmic-ray]
module-path = "{module}"
timeout = 1
excluded-modules = []
test-command = "false"
[cosmic-ray.distributor]
name = "local"
"""


@dataclass(frozen=True)
class Mutant:
    "A change of one place"

    module: str  # Like "models/intervals"
    operator: str
    occurrence: int

    @property
    def file(self) -> str:
        return f"mlpkg/{self.module}.py"


@dataclass(frozen=True)
class Outcome:
    "What became of a change"

    mutant: Mutant
    change: str  # The lines before and after
    killed: bool


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    "Where types are written: a change there is no change of what the code does"
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                end = part.end_lineno or part.lineno, part.end_col_offset or part.col_offset
                found.append(((part.lineno, part.col_offset), end))
    return found


def sample(tool: Path, folder: Path, clone: Path, module: str, size: int, seed: int) -> list[Mutant]:
    "Changes of some places of a module, one for each place"
    path, name = clone / f"mlpkg/{module}.py", module.replace("/", ".")
    config, session = folder / f"{name}.toml", folder / f"{name}.sqlite"
    config.write_text(CONFIG.format(module=path))
    subprocess.run([tool / "cosmic-ray", "init", config, session], check=True, capture_output=True)
    dump = subprocess.run([tool / "cosmic-ray", "dump", session], check=True, capture_output=True, text=True).stdout
    types, places = annotations(path.read_text()), dict[tuple, list[Mutant]]()
    for line in dump.splitlines():
        (one,) = json.loads(line)[0]["mutations"]
        start = tuple(one["start_pos"])
        if "Decorator" not in one["operator_name"] and not any(low <= start < high for low, high in types):
            places.setdefault(start, []).append(Mutant(module, one["operator_name"], one["occurrence"]))
    rng = random.Random(f"{seed} {module}")  # noqa: S311
    chosen = rng.sample(sorted(places), min(size, len(places)))
    return [rng.choice(sorted(places[place], key=repr)) for place in chosen]


def commands(clone: Path, module: str) -> Iterator[list[str]]:
    "What is run, the quickest first"
    page = re.search(r"File to edit: \S*?(nbs/\S+\.ipynb)", (clone / f"mlpkg/{module}.py").read_text())
    assert page, f"mlpkg/{module}.py does not say which page it is from"
    yield [sys.executable, str(clone / "bench/examples.py"), page[1]]
    if TESTS[module]:
        yield [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-o", "addopts=", *TESTS[module]]


def fails(clone: Path, command: Sequence[str], seconds: float) -> bool:
    "Does a command fail, or take far too long?"
    env = dict(os.environ) | {"PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        measure(["timeout", "--kill-after=5", str(seconds), *command], clone, env, clone.with_suffix(".log"))
    except CommandError:
        return True
    return False


def attempt(tool: Path, clone: Path, mutant: Mutant, seconds: float) -> Outcome:
    "Make a change, look whether it is noticed, and take it back"
    git = ["git", "-C", str(clone)]
    apply: list[Any] = [tool / "cosmic-ray", "apply", clone / mutant.file, mutant.operator, str(mutant.occurrence)]
    subprocess.run(apply, check=True, capture_output=True)
    try:
        diff = subprocess.run([*git, "diff", "--unified=0"], check=True, capture_output=True, text=True).stdout
        lines = [line for line in diff.splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
        noticed = any(fails(clone, command, seconds) for command in commands(clone, mutant.module))
        return Outcome(mutant, "\n".join(lines), noticed)
    finally:
        subprocess.run([*git, "checkout", "--quiet", "."], check=True)


def summary(outcomes: list[Outcome]) -> Any:
    "A table of how many changes of each module were noticed"
    table = figures_table("module", "changes", "noticed", "share", names="module")
    for module in [*dict.fromkeys(one.mutant.module for one in outcomes), "all"]:
        part = [one.killed for one in outcomes if module in (one.mutant.module, "all")]
        table.add_row(module, str(len(part)), str(sum(part)), f"{sum(part) / len(part):.0%}")
    return table


def main(
    modules: Annotated[list[str] | None, typer.Argument(help="Like models/intervals; all unless given")] = None,
    size: Annotated[int, typer.Option(help="Changes of each module")] = 30,
    seed: Annotated[int, typer.Option(help="Another seed draws other places")] = 0,
    jobs: Annotated[int, typer.Option(help="Changes tried side by side")] = 2,
    seconds: Annotated[float, typer.Option(help="After which a test that runs has noticed the change")] = 900,
) -> None:
    "Change code that decides, and count what the tests notice"
    console, reasons, outcomes = new_console(), json.loads(REASONS.read_text()), list[Outcome]()
    with scratch() as folder, Progress(console=console) as progress, ThreadPoolExecutor(jobs) as threads:
        tool, clones = make_environment(folder / "tool", (TOOL,), folder / "tool.log"), SimpleQueue[Path]()
        for number in range(jobs):
            clones.put(clone := folder / f"clone-{number}")
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        chosen, passed = modules or list(TESTS), set[tuple[str, ...]]()
        bar = progress.add_task("Changes", total=len(chosen) * size)

        def job(mutant: Mutant) -> Outcome:
            here = clones.get()
            try:
                outcome = attempt(tool, here, mutant, seconds)
                if not outcome.killed:
                    why = reasons.get(outcome.change, "not looked at yet")
                    console.print(f"{mutant.file}: {why}\n{outcome.change}\n", markup=False, highlight=False)
                return outcome
            finally:
                clones.put(here)
                progress.advance(bar)

        for module in chosen:
            needed = [tuple(command) for command in commands(clone, module)]
            if broken := [" ".join(one[1:]) for one in needed if one not in passed and fails(clone, one, seconds)]:
                raise SystemExit(f"this fails without any change: {'; '.join(broken)}; see `make test`")
            passed.update(needed)
            found = list(threads.map(job, sample(tool, folder, clone, module, size, seed)))
            outcomes += found
            console.print(f"{module}: {sum(one.killed for one in found)} of {len(found)} changes were noticed")
    console.print(summary(outcomes))
    raise SystemExit(int(sum(one.killed for one in outcomes) < 0.9 * len(outcomes)))


if __name__ == "__main__":
    typer.run(main)
