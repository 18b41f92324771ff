"""Notebooks in git: clean ones pass, noise and merge conflicts do not. Git itself runs the hook."""

import json
import shutil
import subprocess

import pytest
from conftest import ROOT

from mlpkg.testing import write_notebook


def run(*command, cwd, **kwargs):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)


def test_notebooks_of_the_project_are_clean(tmp_path):
    for folder in ("nbs", "pyproject.toml"):
        (shutil.copytree if (ROOT / folder).is_dir() else shutil.copy)(ROOT / folder, tmp_path / folder)
    run(ROOT / ".venv/bin/nbdev-clean", cwd=tmp_path, check=True)
    changed = [
        path.relative_to(tmp_path)
        for path in tmp_path.glob("nbs/**/*.ipynb")
        if path.read_text() != (ROOT / path.relative_to(tmp_path)).read_text()
    ]
    assert changed == [], "run `make clean-notebooks`"


def test_stored_outputs_are_small():
    for path in ROOT.glob("nbs/**/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert sum(len(json.dumps(cell.get("outputs", []))) for cell in cells) < 60_000, path


@pytest.fixture
def repository(tmp_path):
    "A git repository with the project's hook and environment, and one clean notebook staged"
    root = tmp_path / "repository"
    root.mkdir()
    run("git", "init", "--quiet", cwd=root, check=True)
    for name, value in {"user.name": "Ann", "user.email": "ann@example.org", "core.hooksPath": ".githooks"}.items():
        run("git", "config", name, value, cwd=root, check=True)
    shutil.copytree(ROOT / ".githooks", root / ".githooks")
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / ".venv").symlink_to(ROOT / ".venv")
    write_notebook(root / "step.ipynb", "x = 1")
    run(".venv/bin/nbdev-clean", "--fname", "step.ipynb", cwd=root, check=True)
    return root


def commit(root):
    run("git", "add", "step.ipynb", cwd=root, check=True)
    return run("git", "commit", "--message", "a notebook", cwd=root)


def test_a_clean_notebook_is_committed(repository):
    assert commit(repository).returncode == 0


def test_noise_is_refused(repository):
    path = repository / "step.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][0]["execution_count"] = 7
    path.write_text(json.dumps(nb))
    done = commit(repository)
    assert done.returncode == 1
    assert "step.ipynb: holds noise" in done.stderr and "make clean-notebooks" in done.stderr


def test_a_merge_conflict_is_refused(repository):
    path = repository / "step.ipynb"
    path.write_text(path.read_text().replace('"x = 1"', '"<<<<<<< HEAD\\n",\n    "x = 1"'))
    done = commit(repository)
    assert done.returncode == 1
    assert "step.ipynb: holds a merge conflict" in done.stderr
