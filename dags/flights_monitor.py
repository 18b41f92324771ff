"""
### Flights: has the world changed?

Looks at a month that was predicted: quality of the data, drift of columns and of predictions, and, where the truth is
known, how well the champion did. What clients asked the API in the last weeks is judged in the same way. Only an alarm
updates the asset `flights/drift`, which starts `flights_train`; while a training is running or has just failed, the
alarm waits, and `flights_watch` asks later.
Without a champion there is nothing to judge, and the step is skipped.

Steps: **monitor** -> **retrain** (skipped when all is well). Tables: `monitoring/flights` and
`traffic/flights`.
Runs whenever `flights_predict` has scored months.
"""

from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import (
    Notify,
    batches_param,
    dag_defaults,
    emit_if,
    notebook_step,
    recorded_run,
    require_champion,
)

NOTEBOOKS = "nbs/pipelines/flights"

with DAG(
    "flights_monitor",
    doc_md=__doc__,
    schedule=[Asset("predictions/flights")],
    params={"months": batches_param("2013-10", "months")},
    tags=["flights", "monitor"],
    **dag_defaults(),
):
    with recorded_run():
        monitor = notebook_step(NOTEBOOKS, "34_monitor")
        require_champion("flights") >> monitor
        emit_if(monitor, "retrain", Asset("flights/drift"), on_success_callback=Notify("raised"))
