"""Two notebooks one after the other."""

from airflow.sdk import DAG

from mlpkg.airflow.dags import notebook_steps, recorded_run

with DAG("small", schedule=None, params={"rows": 3}, doc_md=__doc__):
    with recorded_run():
        notebook_steps("notebooks", "10_count", "20_report")
