"""The training pipeline as plain papermill in a loop: step notebooks one after the other, in one process."""

import json
import sys
from pathlib import Path
from typing import Any

import papermill
import scrapbook

NOTEBOOKS, OUTPUT = Path("nbs/pipelines/flights"), Path("var/notebooks")


def step(notebook: str, name: str, **parameters) -> dict[str, Any]:
    "Execute a step notebook and return what it glued"
    output = str(OUTPUT / f"{name}.ipynb")
    papermill.execute_notebook(str(NOTEBOOKS / notebook), output, parameters, progress_bar=False)
    return {key: scrap.data for key, scrap in scrapbook.read_notebook(output).scraps.items()}


def main(candidates: list[str], budget: int, seed: int) -> None:
    "The whole pipeline"
    OUTPUT.mkdir(parents=True)
    trained = [step("20_train.ipynb", f"train-{name}", candidate=name, budget=budget, seed=seed) for name in candidates]
    winner = step("22_evaluate.ipynb", "evaluate", candidates=trained, seed=seed)
    step("24_register.ipynb", "register", **winner)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
