"""
### Flights: batch predictions

Scores each month that arrives with the champion. A month is replaced as a whole, so running it twice leaves one copy;
rows that break the model's contract go to quarantine with the reason. Without a champion there is nothing to do yet,
and the step is skipped.

Step: **predict**. Tables: `predictions/flights`, `quarantine/predictions/flights`.
Runs whenever `flights_etl` has brought in months.
"""

from airflow.sdk import DAG, Asset, Param

from mlpkg.airflow.dags import batches_param, dag_defaults, notebook_step, recorded_run, require_champion

NOTEBOOKS = "nbs/pipelines/flights"

with DAG(
    "flights_predict",
    doc_md=__doc__,
    schedule=[Asset("clean/flights")],
    params={
        "months": batches_param("2013-10", "months"),
        "source": Param(
            "clean/flights",
            type="string",
            description="Lake table, or path, or http(s) or s3 URL of a CSV (also zip or gz) or Parquet file",
        ),
        "which": Param("champion", type="string", description="Alias or number of the model's version"),
        "threshold": Param(
            0.5, type="number", minimum=0, maximum=1, description="Probability from which a flight counts as late"
        ),
        "replace": Param(False, type="boolean", description="May they take the place of another source's predictions?"),
    },
    tags=["flights", "predict"],
    **dag_defaults(),
):
    with recorded_run():
        predict = notebook_step(NOTEBOOKS, "30_predict", outlets=[Asset("predictions/flights")], event_extra=["months"])
        require_champion("flights") >> predict
