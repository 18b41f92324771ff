"""
### Diamonds: has a file arrived?

Looks for files that `pipeline.incoming` in `[model diamonds]` of `settings.ini` describes. New ones update the asset
`incoming/diamonds`, which starts `diamonds_etl` with them; each is announced once, and again when it has changed.

Task: **find_arrivals** (skipped when there is nothing new). Table: `arrivals/diamonds`.
Runs as often as `airflow.arrival_schedule` says; without `pipeline.incoming` never by itself.
"""

from airflow.sdk import DAG

from mlpkg.airflow.dags import dag_defaults
from mlpkg.airflow.pipelines import arrive_schedule, arrive_steps

with DAG(
    "diamonds_arrive",
    doc_md=__doc__,
    schedule=arrive_schedule("diamonds"),
    tags=["diamonds", "etl"],
    **dag_defaults(),
):
    arrive_steps("diamonds")
