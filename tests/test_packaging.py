"""What pip and build see of the project: processes that a notebook page cannot show."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = (ROOT / "mlpkg" / "templates" / "shared.txt").read_text().split()  # what `mlpkg init` gives to others
NEEDED = ("mlpkg", "nbs", "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "settings.ini", *SHARED)


@pytest.fixture
def project(tmp_path):
    "A copy of the project that a test may change, with mlpkg/ as nbs/ exports it"
    folder = tmp_path / "project"
    folder.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for module in (folder / "mlpkg").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    done = run("from nbdev.doclinks import nbdev_export; nbdev_export()", folder)
    assert done.returncode == 0, done.stderr
    return folder


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    "Run Python code in a folder, as a packaging tool would"
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)  # noqa: S603


def hook(name: str, folder: Path, before: str = "") -> subprocess.CompletedProcess:
    "Call one hook of the build backend, which is what `pip` and `build` do; files go to dist/"
    (folder / "dist").mkdir(exist_ok=True)
    return run(f"{before}\nfrom setuptools import build_meta\nbuild_meta.{name}('dist')", folder)


def change_notebook(folder: Path) -> None:
    "Add one exported line to the first library notebook"
    notebook = next((folder / "nbs" / "api").glob("00_*.ipynb"))
    content = json.loads(notebook.read_text())
    cell = next(cell for cell in content["cells"] if "".join(cell["source"]).startswith("#| export\nclass"))
    cell["source"] = "".join(cell["source"]) + "\n\nchanged = True"
    notebook.write_text(json.dumps(content))


NO_NBDEV = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "nbdev" else find_spec(name, *args)
"""


def test_package_is_in_step_with_notebooks():
    done = run("import setuptools; setuptools.setup = lambda **_: None; import setup; setup.check_exported()", ROOT)
    assert done.returncode == 0, done.stderr


def test_an_export_leaves_pyproject_alone(project):
    os.utime(project / "pyproject.toml", (1e9, 1e9))
    before = (project / "pyproject.toml").read_text()
    done = run("from nbdev.doclinks import nbdev_export; nbdev_export()", project)
    assert done.returncode == 0, done.stderr
    assert (project / "pyproject.toml").read_text() == before
    assert (project / "pyproject.toml").stat().st_mtime == 1e9, "nor its modification time, which tools look at"


def test_wheel_holds_package_and_entry_points(project):
    done = hook("build_wheel", project)
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_file,) = [name for name in names if name.endswith("entry_points.txt")]
        entries = configparser.ConfigParser(delimiters="=")
        entries.read_string(archive.read(entry_file).decode())
    modules = {file.relative_to(project).as_posix() for file in (project / "mlpkg").rglob("*.py")}
    assert "mlpkg/data/lake.py" in modules
    assert modules <= names
    pages = {f"mlpkg/pages/{page.name}" for page in (project / "nbs" / "how-to").glob("*.ipynb")}
    assert "mlpkg/pages/your_own_table.ipynb" in pages and pages <= names, "for `mlpkg docs`"
    assert not [name for name in names if not name.startswith(("mlpkg/", "mlpkg-"))], "only the package is installed"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert entries["console_scripts"]["mlpkg"] == "mlpkg.cli.start:main"
    assert entries["papermill.io"]["mlflow://"].startswith("mlpkg.steps.notebook_paths:")
    assert entries["nbdev"]["mlpkg"] == "mlpkg._modidx:d"


@pytest.mark.parametrize("name", ["build_wheel", "build_sdist"])
def test_refuses_when_a_notebook_was_changed(project, name):
    change_notebook(project)
    done = hook(name, project)
    assert done.returncode != 0
    assert "out of step with nbs/" in done.stderr
    assert "make prepare" in done.stderr
    assert "+changed = True" in done.stderr
    assert not list((project / "dist").iterdir())


def test_refuses_a_module_without_notebook(project):
    (project / "mlpkg" / "stray.py").write_text("x = 1\n")
    done = hook("build_wheel", project)
    assert done.returncode != 0
    assert "--- mlpkg/stray.py" in done.stderr


def test_editable_install_needs_no_nbdev(project):
    change_notebook(project)
    done = hook("build_editable", project, before=NO_NBDEV)
    assert done.returncode == 0, done.stderr


def test_without_nbdev_says_what_to_install(project):
    done = hook("build_wheel", project, before=NO_NBDEV)
    assert done.returncode != 0
    assert "pip install 'nbdev" in done.stderr


def test_sdist_builds_without_nbdev(project, tmp_path):
    done = hook("build_sdist", project)
    assert done.returncode == 0, done.stderr
    (sdist,) = (project / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (unpacked / "nbs" / "api").is_dir()
    assert hook("build_wheel", unpacked, before=NO_NBDEV).returncode == 0
    shutil.rmtree(unpacked / "nbs")
    assert hook("build_wheel", unpacked).returncode == 0, "a tree without notebooks has nothing to compare"
