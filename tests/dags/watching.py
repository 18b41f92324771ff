"""A DAG that records a run only if there is a reason."""

from airflow.sdk import DAG

from mlpkg.airflow.dags import notebook_steps, recorded_run, require_reason

with DAG("watching", schedule=None, params={"rows": 3}, doc_md=__doc__):
    with recorded_run(after=require_reason("small", "monitoring/parcels")):
        notebook_steps("notebooks", "10_count")
