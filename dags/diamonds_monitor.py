"""
### Diamonds: has the world changed?

Looks at batches that were predicted: quality of the data, drift of columns and of predictions, and, where the truth is
known, how well the champion did. Only an alarm updates the asset `diamonds/drift`, which starts `diamonds_train`.

Steps: **monitor** -> **retrain** (skipped when all is well). Table: `monitoring/diamonds`.
Runs whenever `diamonds_predict` has scored batches of the lake.
"""

from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import dag_defaults, recorded_run
from mlpkg.airflow.pipelines import monitor_params, monitor_steps

with DAG(
    "diamonds_monitor",
    doc_md=__doc__,
    schedule=[Asset("predictions/diamonds")],
    params=monitor_params(),
    tags=["diamonds", "monitor"],
    **dag_defaults(),
):
    with recorded_run():
        monitor_steps("diamonds")
