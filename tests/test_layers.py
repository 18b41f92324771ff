"""The layers hold: no import goes upward or in a circle, only the example imports the example, no module is long.

The rules are in pyproject.toml, under `[tool.importlinter]`.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess:
    "Check the package in a folder against the contracts in its pyproject.toml"
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})


@pytest.fixture
def package(tmp_path) -> Path:
    "A folder with a copy of the package, to put a wrong import into"
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "mlpkg", tmp_path / "mlpkg", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_package_keeps_its_layers():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [("data/lake", "models.registry"), ("settings", "data.lake"), ("steps/run", "airflow.dags")],
)
def test_an_import_that_goes_upward_is_refused_by_name(package, module, imported):
    with (package / f"mlpkg/{module}.py").open("a") as file:
        file.write(f"\n\ndef later():\n    import mlpkg.{imported}\n")
    done = lint(package)
    assert done.returncode == 1
    assert f"mlpkg.{module.replace('/', '.')} -> mlpkg.{imported}" in done.stdout


def test_an_import_of_the_example_is_refused_by_name(package):
    with (package / "mlpkg/cli/main.py").open("a") as file:
        file.write("\nfrom mlpkg.examples.flights import split\n")
    done = lint(package)
    assert done.returncode == 1
    assert "mlpkg.cli.main -> mlpkg.examples.flights" in done.stdout


def test_a_circular_import_in_one_layer_is_refused_by_name(package):
    with (package / "mlpkg/data/lake.py").open("a") as file:
        file.write("\nfrom mlpkg.data.contracts import check\n")
    done = lint(package)
    assert done.returncode == 1
    assert ".lake" in done.stdout and ".contracts" in done.stdout


def test_no_module_has_more_than_400_lines():
    modules = [path for path in (ROOT / "mlpkg").rglob("*.py") if path.name != "_modidx.py"]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_a_public_name_means_one_thing():
    "So the documentation can link every bare name, and an import says what is meant"
    meanings = defaultdict(list)
    for path in sorted((ROOT / "mlpkg").rglob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            method = any("patch" in ast.unparse(one) for one in getattr(node, "decorator_list", []))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not method:
                meanings[node.name].append(path.relative_to(ROOT).as_posix())
    del meanings["main"]  # what `python -m` starts
    assert len(meanings) > 500
    assert {name: where for name, where in meanings.items() if len(where) > 1} == {}


def imported(path: Path) -> list[tuple[str, str]]:
    "Module and name of whatever a notebook or a script imports from the package"
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"] if path.suffix == ".ipynb" else [{"cell_type": "code", "source": text}]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for one in sources for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", one)))]
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return [
        (str(node.module), one.name) for node in found if str(node.module).startswith("mlpkg.") for one in node.names
    ]


def test_what_notebooks_and_scripts_import_from_the_package_exists():
    "A name that has moved is missed here, and not by the operator whose weekly step fails"
    folders = ("nbs", "bench", "dags", "docs", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in (".ipynb", ".py")]
    names = {(module, name): path for path in paths for module, name in imported(path)}
    lost = [
        (str(path.relative_to(ROOT)), *one) for one, path in names.items() if not hasattr(import_module(one[0]), one[1])
    ]
    assert lost == []
