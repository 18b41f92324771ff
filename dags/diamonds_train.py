"""
### Diamonds: training

Trains candidates side by side, compares the best with the champion on rows from which neither has learned, registers
it, and makes it champion if it wins by the rules in `settings.ini`.

Steps: **train** (one for each candidate) -> **evaluate** -> **register**.
Runs on the schedule of the settings, and when `diamonds_monitor` or `diamonds_watch` ask for it.
"""

from airflow.sdk import DAG

from mlpkg.airflow.dags import dag_defaults, recorded_run
from mlpkg.airflow.pipelines import train_params, train_schedule, train_steps

with DAG(
    "diamonds_train",
    doc_md=__doc__,
    schedule=train_schedule("diamonds"),
    params=train_params(["ridge", "random_forest", "hist_gradient_boosting"]),
    tags=["diamonds", "train"],
    **dag_defaults(),
):
    with recorded_run():
        train_steps("diamonds")
