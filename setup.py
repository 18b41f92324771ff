"""Packaging shim: refuses to build a wheel or an sdist while mlpkg/ is out of step with nbs/.

Everything else about the package is in pyproject.toml. An editable install is not checked, so it stays quick and needs
no nbdev. A tree unpacked from an sdist was checked when the sdist was built; it is checked again where nbdev is there.
"""

import difflib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.absolute()
PACKAGE = "mlpkg"


def _modules(folder: Path) -> dict[str, str]:
    "Text of each Python file of the package, by its path in the project"
    files = sorted((folder / PACKAGE).rglob("*.py"))
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in files}


def _export(root: Path, folder: Path) -> dict[str, str]:
    "Export the notebooks of `root` in an empty `folder`; the modules that come out"
    shutil.copy(root / "pyproject.toml", folder)
    shutil.copytree(root / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    (folder / PACKAGE).mkdir()
    shutil.copy(root / PACKAGE / "__init__.py", folder / PACKAGE)  # holds the version; all else comes from notebooks
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # nbdev exports nothing under IN_TEST
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"the notebooks in {root / 'nbs'} cannot be exported:\n{done.stderr.strip()}")
    return _modules(folder)


def out_of_step(root: Path = ROOT) -> str:
    "What separates mlpkg/ from a fresh export of nbs/, as a diff; empty when they are in step"
    found = _modules(root)
    with tempfile.TemporaryDirectory() as folder:
        wanted = _export(root, Path(folder))
    lines: list[str] = []
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name, "").splitlines(), wanted.get(name, "").splitlines()
        lines += difflib.unified_diff(old, new, name, f"{name} (exported from nbs/)", n=1, lineterm="")
    return "\n".join(lines)


def check_exported(root: Path = ROOT) -> None:
    "End the build where mlpkg/ is not what nbs/ exports"
    if not (root / "nbs").is_dir():
        return
    if importlib.util.find_spec("nbdev") is None:
        if (root / "PKG-INFO").is_file():
            return
        raise SystemExit(
            f"nbdev is not installed, so nothing can tell whether {PACKAGE}/ is in step with nbs/.\n"
            "Run `make setup`, then build with `.venv/bin/python -m build --no-isolation`;\n"
            "elsewhere `pip install 'nbdev>=3.3.26,<4' 'setuptools>=80'` and give pip `--no-build-isolation`."
        )
    if diff := out_of_step(root):
        raise SystemExit(f"{PACKAGE}/ is out of step with nbs/. Run `make prepare` and look at the change:\n{diff}")


def copy_shared(package: Path, root: Path = ROOT) -> None:
    "Put files of this repository that `mlpkg init` gives to others beside the templates"
    for name in (root / PACKAGE / "templates" / "shared.txt").read_text(encoding="utf-8").split():
        target = package / "templates" / "shared" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)


def copy_pages(package: Path, root: Path = ROOT) -> None:
    "Put the how-to pages into the package, for `mlpkg docs`"
    for page in sorted((root / "nbs" / "how-to").glob("*.ipynb")):
        (package / "pages").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, package / "pages" / page.name)


class CheckedBuild(build_py):
    "build_py that checks first; an editable install builds nothing, so there is nothing to check"

    def run(self):
        if not self.editable_mode:
            check_exported()
        super().run()
        if not self.editable_mode:
            copy_shared(Path(self.build_lib) / PACKAGE)
            copy_pages(Path(self.build_lib) / PACKAGE)


class CheckedSdist(sdist):
    "sdist that checks first"

    def run(self):
        check_exported()
        super().run()


setup(cmdclass={"build_py": CheckedBuild, "sdist": CheckedSdist})
