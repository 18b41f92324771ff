"""The digest of the package's code decides what is trained again; tested on copies of the real package."""

import shutil

import pytest
from conftest import ROOT

from mlpkg.steps.provenance import package_digest

LAKE = "data/lake.py"


@pytest.fixture
def package(tmp_path):
    "A copy of the package in another place"
    return shutil.copytree(ROOT / "mlpkg", tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))


def test_it_does_not_depend_on_the_location(package):
    assert package_digest(package) == package_digest()


def test_a_change_in_a_sub_package_changes_it(package):
    with (package / LAKE).open("a") as file:
        file.write("\nanswer = 42\n")
    assert package_digest(package) != package_digest()


def test_comments_and_blank_lines_do_not_change_it(package):
    text = (package / LAKE).read_text()
    (package / LAKE).write_text("# A remark\n\n" + text.replace("\nimport ", "\n\nimport ", 1) + "\n# The end\n")
    errors = (package / "errors.py").read_text()
    (package / "errors.py").write_text(errors.replace("(Exception):", "(Exception):  # Of them all"))
    assert package_digest(package) == package_digest()


def test_swapping_two_files_changes_it(package):
    first, second = package / LAKE, package / "data" / "contracts.py"
    contents = first.read_text(), second.read_text()
    second.write_text(contents[0])
    first.write_text(contents[1])
    assert package_digest(package) != package_digest()


def test_moving_a_file_to_another_layer_changes_it(package):
    (package / LAKE).rename(package / "steps" / "lake.py")
    assert package_digest(package) != package_digest()


def test_it_does_not_depend_on_the_order_of_the_files(package, monkeypatch):
    before, rglob = package_digest(package), type(package).rglob
    monkeypatch.setattr(type(package), "rglob", lambda path, pattern: reversed(list(rglob(path, pattern))))
    assert package_digest(package) == before
