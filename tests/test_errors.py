"""Errors that are raised on purpose: one base class for all of them, and no traceback on the command line.

A page shows the errors of its own module; this looks at all modules together.
"""

import ast
import builtins
import importlib
import os
import pkgutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import mlpkg
from mlpkg.cli import main as command_line
from mlpkg.errors import MlpkgError

MODULES = sorted(m.name for m in pkgutil.walk_packages(mlpkg.__path__, "mlpkg.") if not m.ispkg and "._" not in m.name)

# Error classes that have another base, because a framework asks for it: name -> reason.
DEMANDED: dict[str, str] = {
    "mlpkg.steps.launcher.ColdStart": "the launcher runs without packages, and never lets it out",
    "mlpkg.steps.template.Kernel": "not an error: it carries a request out of the template in a child",
}

# Modules that may raise a built-in error directly: name -> reason.
BUILT_IN = {
    "mlpkg.lazy": "Python asks a module for a name with an AttributeError",
    "mlpkg.groups": "pydantic collects the ValueError of a validator into an error that names the setting",
    "mlpkg.serving.feedback": "a lake that does not exist is handled like one that is unreachable, which is an OSError",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, type]:
    "Every error class that the package defines, by its full name"
    os.environ.setdefault("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
    found = {}
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == name:
                found[f"{name}.{value.__name__}"] = value
    return found


def layer(name: str) -> str:
    "The layer that a full name belongs to"
    return name.split(".")[1]


def test_every_error_class_has_the_one_base(errors):
    assert len(errors) > 15, "the walk finds the error classes"
    assert {name for name, found in errors.items() if not issubclass(found, MlpkgError)} == DEMANDED.keys()


@pytest.mark.parametrize("module", MODULES)
def test_no_built_in_error_is_raised_directly(module):
    tree = ast.parse(Path(ROOT, *module.split(".")).with_suffix(".py").read_text())
    raised = [ast.unparse(node.exc.func) for node in ast.walk(tree) if isinstance(node, ast.Raise) and is_call(node)]
    plain = [name for name in raised if isinstance(getattr(builtins, name, None), type)]
    assert not plain or module in BUILT_IN, f"{module} raises {', '.join(plain)}: give it a class of its own"


def is_call(node: ast.Raise) -> bool:
    return isinstance(node.exc, ast.Call)


def test_the_command_line_shows_each_without_a_traceback(errors, monkeypatch, capsys):
    assert {layer(name) for name in errors} >= {"settings", "data", "steps", "models", "serving", "airflow", "cli"}
    monkeypatch.setattr(sys, "argv", ["mlpkg"])
    for name, found in errors.items():
        if name in DEMANDED:
            continue
        error = found.__new__(found, f"{name}: what to do")  # without the arguments that some of them ask for
        monkeypatch.setattr(command_line, "app", raising(error))
        with pytest.raises(SystemExit) as end:
            command_line.main()
        assert end.value.code == 2
        shown = capsys.readouterr().err
        assert shown.startswith("mlpkg: ") and "Traceback" not in shown


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command_line, "app", raising(KeyError("a bug")))
    with pytest.raises(KeyError):
        command_line.main()


def raising(error: BaseException):
    "A command that fails"

    def app():
        raise error

    return app
