"""
### Flights: which flights will arrive late?

Trains the candidate models in parallel, each a run of the same notebook, evaluates the best of them on the held-out
months next to the champion, registers it, and makes it champion if it is better by the rules in `settings.ini`. A
candidate that cannot be trained is named in the evaluation, which goes on with the others.

Steps: **train** (once for each candidate) -> **evaluate** -> **register**. Table: `split/flights`. Model: `flights`.
Runs when the monitor raises an alarm (asset `flights/drift`), when the code has changed (`flights/retrain`), and as
`airflow.train_schedule` in settings.ini says.
"""

from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, CronTriggerTimetable, Param

from mlpkg.airflow.dags import Notify, dag_defaults, mapped_notebook_step, notebook_step, recorded_run
from mlpkg.settings import load_settings

NOTEBOOKS = "nbs/pipelines/flights"

with DAG(
    "flights_train",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable(load_settings().airflow.train_schedule, timezone="UTC"),
        assets=Asset("flights/drift") | Asset("flights/retrain"),
    ),
    params={
        "candidates": Param(
            ["logistic_regression", "random_forest", "hist_gradient_boosting"],
            type="array",
            description="Models to try",
        ),
        "months": Param("", type="string", description="Months to train on; empty: all training months of the split"),
        "budget": Param(
            3, type="integer", minimum=0, description="Trials of the hyperparameter search for each candidate"
        ),
        "seed": Param(0, type="integer", description="Seed for everything that is random"),
        "reason": Param(
            "", type="string", description="Why the model is trained; the event of an asset brings its own reason"
        ),
    },
    tags=["flights", "train"],
    **dag_defaults(),
):
    with recorded_run():
        train = mapped_notebook_step(NOTEBOOKS, "20_train", over="candidates", parameter="candidate")
        trained = {"candidates": train.output}
        evaluate = notebook_step(NOTEBOOKS, "22_evaluate", parameters=trained, trigger_rule="all_done_min_one_success")
        register = notebook_step(
            NOTEBOOKS, "24_register", parameters=evaluate.output, on_success_callback=Notify("finished", "reason")
        )
        train >> evaluate >> register
