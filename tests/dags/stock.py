"""Airflow's own PapermillOperator, with its notebook stored under an mlflow:// path."""

from airflow.providers.papermill.operators.papermill import PapermillOperator
from airflow.sdk import DAG

from mlpkg.airflow.dags import close_run, open_run

with DAG("stock", schedule=None, doc_md=__doc__):
    opened = open_run()
    count = PapermillOperator(
        task_id="count",
        input_nb="notebooks/10_count.ipynb",
        output_nb="mlflow://{{ ti.xcom_pull('open_run') }}/notebook/count.ipynb",
        parameters={"rows": 5},
    )
    opened >> count >> close_run().as_teardown(setups=opened)
