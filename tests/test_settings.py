"""Every setting is read somewhere. Seeing that nothing reads a key takes all files, so a page cannot show it."""

import ast
import re

import nbformat
import pytest
from conftest import ROOT

from mlpkg.settings import Settings, known_keys


def attributes(source):
    "Every `owner.name` in code, as a pair: comments, docstrings and messages do not count"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            yield owner, node.attr


def read_keys(sources):
    "The settings that code reads: as `group.name`, or as `rules.name` where it is given the group itself"
    found = set()
    for source in sources:
        pairs = set(attributes(source))
        for key in known_keys():
            group, name = key.split(".")
            owners = {group}
            given = re.search(rf"(connect\(\)|for_model\(\S+\)).{group}\b", source)
            if given or Settings.model_fields[group].annotation.__name__ in source:
                owners |= {"rules", "settings"}
            if any((owner, name) in pairs for owner in owners):
                found.add(key)
    return found


@pytest.fixture(scope="module")
def read():
    skipped = {ROOT / "mlpkg" / "settings.py", ROOT / "mlpkg" / "_modidx.py"}
    files = {*ROOT.glob("mlpkg/**/*.py"), *ROOT.glob("dags/*.py")} - skipped
    steps = [nbformat.read(path, as_version=4) for path in ROOT.glob("nbs/pipelines/**/*.ipynb")]
    code = ["\n".join(cell.source for cell in step.cells if cell.cell_type == "code") for step in steps]
    return read_keys([*(path.read_text(encoding="utf-8") for path in files), *code])


@pytest.mark.parametrize("key", known_keys())
def test_a_setting_is_read(key, read):
    assert key in read, f"nothing reads {key}: use it, or take it out of the settings"


def test_a_setting_that_is_only_mentioned_counts_as_not_read():
    code = "def f(settings):\n    'See `steps.outbox`'  # lake.spill\n    return settings.lake.root"
    assert read_keys([code]) == {"lake.root"}
