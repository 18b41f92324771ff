"""
### Flights: which flights will arrive late?

Trains the candidate models in parallel, each a run of the same notebook, evaluates the best of them on the held-out
months beside the champion, registers it, and makes it champion if it is better by the margin in `settings.ini`.

Steps: **train** (once for each candidate) -> **evaluate** -> **register**. Table: `split/flights`. Model: `flights`.
Runs when the monitor raises an alarm (asset `flights/drift`), when the code has changed (`flights/retrain`), and as
`airflow.train_schedule` in settings.ini says.
"""

from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, CronTriggerTimetable, Param, task

from mlpkg.airflow.dags import NotebookOperator, Notify, notebook_step, recorded_run, step_defaults
from mlpkg.settings import load_settings

NOTEBOOKS = "nbs/pipelines/flights"


@task
def candidates(params=None) -> list[dict[str, str]]:
    "Parameters of each training run"
    return [{"candidate": name} for name in params["candidates"]]


with DAG(
    "flights_train",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable(load_settings().airflow.train_schedule, timezone="UTC"),
        assets=Asset("flights/drift") | Asset("flights/retrain"),
    ),
    # No start date: one in the past would start a run as soon as the DAG is switched on.
    catchup=False,
    max_active_runs=1,
    default_args=step_defaults(),
    params={
        "candidates": Param(
            ["logistic_regression", "random_forest", "hist_gradient_boosting"],
            type="array",
            description="Models to try",
        ),
        "months": Param(
            "", type="string", description="Months to train on; empty: all that the split gave to training"
        ),
        "budget": Param(
            3, type="integer", minimum=0, description="Trials of the hyperparameter search for each candidate"
        ),
        "seed": Param(0, type="integer", description="Seed of everything that is drawn at random"),
        "reason": Param("", type="string", description="Why it is trained; events of assets say so by themselves"),
    },
    tags=["flights", "train"],
):
    with recorded_run():
        train = NotebookOperator.partial(
            task_id="train",
            input_nb=f"{NOTEBOOKS}/20_train.ipynb",
            dag_params=True,
            map_index_template="{{ task.parameters['candidate'] }}",
        ).expand(parameters=candidates())
        evaluate = notebook_step(NOTEBOOKS, "22_evaluate", parameters={"candidates": train.output})
        told = Notify("decided", "reason")
        register = notebook_step(NOTEBOOKS, "24_register", parameters=evaluate.output, on_success_callback=told)
        train >> evaluate >> register
