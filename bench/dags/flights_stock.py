"""
### Flights: the training pipeline with the stock `PapermillOperator`

The step notebooks of `flights_train`, unchanged. Executed notebooks stay on local disk. Between two steps, a
task reads the scraps of the stored notebook and passes them on.
"""

from datetime import datetime

from airflow.providers.papermill.operators.papermill import PapermillOperator
from airflow.sdk import DAG, Param, task

NOTEBOOKS, OUTPUT = "nbs/pipelines/flights", "var/notebooks"


def glued(name: str) -> dict:
    "Scraps of an executed notebook"
    import scrapbook

    scraps = scrapbook.read_notebook(f"{OUTPUT}/{name}.ipynb").scraps
    return {key: scrap.data for key, scrap in scraps.items()}


@task
def trainings(params=None) -> list[dict]:
    "Arguments of each training"
    shared = {"budget": params["budget"], "seed": params["seed"]}
    return [
        {"output_nb": f"{OUTPUT}/train-{name}.ipynb", "parameters": {"candidate": name, **shared}}
        for name in params["candidates"]
    ]


@task
def trained(params=None) -> dict:
    "Parameters of the evaluation"
    return {"candidates": [glued(f"train-{name}") for name in params["candidates"]], "seed": params["seed"]}


@task
def winner() -> dict:
    "Parameters of the registration"
    return glued("evaluate")


with DAG(
    "flights_stock",
    doc_md=__doc__,
    schedule=None,
    start_date=datetime(2013, 1, 1),
    catchup=False,
    params={
        "candidates": Param([], type="array", description="Models to try"),
        "budget": Param(3, type="integer", description="Trials of the search for each candidate"),
        "seed": Param(0, type="integer", description="Seed of everything that is drawn at random"),
    },
    tags=["bench"],
):
    train = PapermillOperator.partial(task_id="train", input_nb=f"{NOTEBOOKS}/20_train.ipynb")
    candidates, best = trained(), winner()
    evaluate = PapermillOperator(
        task_id="evaluate",
        input_nb=f"{NOTEBOOKS}/22_evaluate.ipynb",
        output_nb=f"{OUTPUT}/evaluate.ipynb",
        parameters=candidates,
    )
    register = PapermillOperator(
        task_id="register",
        input_nb=f"{NOTEBOOKS}/24_register.ipynb",
        output_nb=f"{OUTPUT}/register.ipynb",
        parameters=best,
    )
    train.expand_kwargs(trainings()) >> candidates >> evaluate >> best >> register
