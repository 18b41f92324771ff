"""The rules that every DAG of the project follows, checked on the DAG files themselves: loading them needs Airflow."""

import ast
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import ROOT

from mlpkg.settings import load_settings

DAGS = sorted(path.stem for path in (ROOT / "dags").glob("*.py"))
STEPPED = [name for name in DAGS if not name.endswith("_arrive")]  # The others look for files, and record no run
STEPS = sorted(ROOT.glob("nbs/pipelines/*/*.ipynb"))


@pytest.fixture(scope="module")
def dags(tmp_path_factory):
    "The project's DAGs, loaded by Airflow"
    os.environ.setdefault("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=ROOT / "dags")
    assert not bag.import_errors
    return bag.dags


def notebook_tasks(dag):
    "The step tasks of a DAG; of a mapped one, its operator arguments"
    from airflow.sdk.definitions.mappedoperator import MappedOperator

    for task in dag.tasks:
        arguments = task.partial_kwargs if isinstance(task, MappedOperator) else vars(task)
        if "input_nb" in arguments:
            yield task.task_id, arguments


@pytest.mark.parametrize("name", DAGS)
def test_file_holds_one_documented_dag(dags, name):
    assert [dag.dag_id for dag in dags.values() if Path(dag.fileloc).stem == name] == [name]
    dag = dags[name]
    assert dag.doc_md and dag.tags and not dag.catchup
    assert dag.default_args["retries"] >= 1
    assert dag.dagrun_timeout > dag.default_args["execution_timeout"] > timedelta(seconds=load_settings().steps.timeout)
    assert all(dag.params.get_param(param).description for param in dag.params)


@pytest.mark.parametrize("name", STEPPED)
def test_steps_exist_and_declare_what_they_are_given(dags, name):
    from mlpkg.steps.parameters import read_parameters

    tasks = dict(notebook_tasks(dags[name]))
    assert tasks
    used = set()
    for task_id, arguments in tasks.items():
        declared = {p.name for p in read_parameters(ROOT / arguments["input_nb"])}
        given = arguments.get("parameters")
        assert not isinstance(given, dict) or set(given) <= declared, task_id
        used |= declared
    assert set(dags[name].params) - {"candidates"} <= used, "a DAG parameter that no step takes"


@pytest.mark.parametrize("name", STEPPED)
def test_runs_are_recorded_from_first_to_last_step(dags, name):
    dag = dags[name]
    assert dag.get_task("open_run").is_setup and dag.get_task("close_run").is_teardown
    for task_id, _ in notebook_tasks(dag):
        assert "open_run" in dag.get_task(task_id).get_flat_relative_ids(upstream=True)
        assert "close_run" in dag.get_task(task_id).get_flat_relative_ids(upstream=False)


def test_a_mapped_step_without_a_task_before_it_waits_for_its_run(dags):
    from airflow.dag_processing.dagbag import DagBag

    mapped = DagBag(dag_folder=ROOT / "tests" / "dags").dags["mapped"]
    assert mapped.get_task("count").upstream_task_ids == {"open_run"}
    assert mapped.get_task("close_run").upstream_task_ids == {"open_run", "total"}


def test_a_candidate_that_cannot_be_trained_does_not_stop_the_others(dags):
    assert dags["flights_train"].get_task("evaluate").trigger_rule == "all_done_min_one_success"


def test_every_asset_that_a_dag_waits_for_is_updated_by_another(dags):
    from airflow.sdk import Asset

    def leaves(condition):
        "Names of the assets in a condition; empty without one"
        parts = getattr(condition, "objects", [])
        return [name for part in parts for name in leaves(part)] if parts else [condition.name] if condition else []

    updated = {o.name for dag in dags.values() for t in dag.tasks for o in t.outlets if isinstance(o, Asset)}
    waited = {name: leaves(getattr(dag.timetable, "asset_condition", None)) for name, dag in dags.items()}
    waited = {name: names for name, names in waited.items() if names}
    assert waited == {
        "flights_predict": ["clean/flights"],
        "flights_monitor": ["predictions/flights"],
        "flights_train": ["flights/drift", "flights/retrain"],
        "diamonds_etl": ["incoming/diamonds"],
        "diamonds_predict": ["clean/diamonds"],
        "diamonds_monitor": ["predictions/diamonds"],
        "diamonds_train": ["diamonds/drift", "diamonds/retrain"],
    }
    assert {name for names in waited.values() for name in names} <= updated


@pytest.mark.parametrize("name", DAGS)
def test_nothing_heavy_is_imported_at_the_top(name):
    tree = ast.parse((ROOT / "dags" / f"{name}.py").read_text())
    imported = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= {"datetime", "airflow", "mlpkg"}


def test_loading_the_operator_loads_no_data_or_tracking_library():
    heavy = ["mlflow", "sklearn", "optuna", "pandera", "matplotlib", "deltalake", "nbconvert"]
    code = f"import sys, mlpkg.airflow.dags; print([m for m in {heavy} if m in sys.modules])"
    alone = (
        f"import sys, airflow.providers.papermill.operators.papermill; print([m for m in {heavy} if m in sys.modules])"
    )
    ours, provider = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        for c in (code, alone)
    )
    assert ours == provider


@pytest.mark.parametrize("notebook", STEPS, ids=lambda path: path.stem)
def test_step_notebooks_explain_their_parameters(notebook):
    from mlpkg.steps.parameters import read_parameters

    for parameter in read_parameters(notebook):
        assert parameter.help and not parameter.required and parameter.type_name != "Any", parameter.name


@pytest.mark.parametrize("notebook", STEPS, ids=lambda path: path.stem)
def test_step_notebooks_belong_to_a_dag(dags, notebook):
    used = {arguments["input_nb"] for dag in dags.values() for _, arguments in notebook_tasks(dag)}
    assert str(notebook.relative_to(ROOT)) in used
