"""
### Chains of empty tasks, of stock operators and of recorded steps

Each DAG is a chain of `BENCH_STEPS` tasks that do the same: nothing, or one of the notebooks beside the DAGs. Those of
a DAG named `cached` are not executed again as long as nothing has changed.
"""

import os
from pathlib import Path

from airflow.providers.papermill.operators.papermill import PapermillOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG, chain

from mlpkg.airflow.dags import dag_defaults, recorded_run
from mlpkg.airflow.operators import NotebookOperator

NOTEBOOKS, OUTPUT = Path("notebooks").absolute(), Path("var/out").absolute()
COUNTS = [int(count) for count in os.environ["BENCH_STEPS"].split(",")]


def nothing() -> None:
    "Do nothing"


def empty(name: str, place: int) -> PythonOperator:
    "A task that does nothing"
    return PythonOperator(task_id=f"task_{place}", python_callable=nothing)


def stock(name: str, place: int) -> PapermillOperator:
    "A notebook, by the operator of Airflow's provider"
    output = str(OUTPUT / f"{name}-{place}.ipynb")
    return PapermillOperator(task_id=f"task_{place}", input_nb=str(NOTEBOOKS / f"{name}.ipynb"), output_nb=output)


def ours(name: str, place: int, cache: bool = False) -> NotebookOperator:
    "A notebook, recorded in MLflow"
    return NotebookOperator(task_id=f"task_{place}", input_nb=str(NOTEBOOKS / f"{name}.ipynb"), cache=cache)


for count in COUNTS:
    with DAG(f"empty_nothing_{count}", schedule=None):
        chain(*(empty("nothing", place) for place in range(count)))
    for name in ("trivial", "usual"):
        with DAG(f"stock_{name}_{count}", schedule=None):
            chain(*(stock(name, place) for place in range(count)))
        with DAG(f"ours_{name}_{count}", schedule=None, **dag_defaults()):
            with recorded_run():
                chain(*(ours(name, place) for place in range(count)))
    with DAG(f"cached_usual_{count}", schedule=None, **dag_defaults()):
        with recorded_run():
            chain(*(ours("usual", place, cache=True) for place in range(count)))
