"""
### Diamonds: should we train again?

Asks for a training if the code has changed since the last one, or if an alarm is open that no training has answered.

Steps: **watch** -> **retrain** (skipped when there is no reason).
Runs on the schedule of the settings.
"""

from airflow.sdk import DAG

from mlpkg.airflow.dags import dag_defaults, recorded_run
from mlpkg.airflow.pipelines import reason_to_train, watch_steps
from mlpkg.settings import load_settings

with DAG(
    "diamonds_watch",
    doc_md=__doc__,
    schedule=load_settings().airflow.watch_schedule,
    tags=["diamonds", "train"],
    **dag_defaults(),
):
    with recorded_run(after=reason_to_train("diamonds")):
        watch_steps("diamonds")
