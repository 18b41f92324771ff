"""
### Flights: is there a reason to train again?

Checks whether the code (step notebooks or library) has changed since the last training that finished, whether its model
became champion or not, and whether an alarm of the monitor has not yet led to a successful training. Either reason
updates the asset `flights/retrain`, which starts `flights_train`.

Steps: **watch** -> **retrain**, both skipped where there is no reason: then nothing is recorded either. Runs as
`airflow.watch_schedule` in settings.ini says.
"""

from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import Notify, dag_defaults, emit_if, notebook_step, recorded_run, require_reason
from mlpkg.settings import load_settings

NOTEBOOKS = "nbs/pipelines/flights"

with DAG(
    "flights_watch",
    doc_md=__doc__,
    schedule=load_settings().airflow.watch_schedule,
    tags=["flights", "train"],
    **dag_defaults(),
):
    with recorded_run(after=require_reason("flights_train", "monitoring/flights", "month")):
        watch = notebook_step(NOTEBOOKS, "40_watch")
        emit_if(watch, "retrain", Asset("flights/retrain"), on_success_callback=Notify("requested"))
