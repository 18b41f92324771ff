"""
### Flights: from source to training data

Takes the flights that left New York in the given months, checks them against their contract, cleans them, joins weather
and planes, and splits them by time. Each month is replaced as a whole, so running it twice leaves one copy.

Steps: **ingest** -> **validate** -> **clean** -> **split**.

Tables: `raw/*`, `quarantine/*`, `clean/flights`, `split/flights`. The last step updates the asset `clean/flights`,
which starts `flights_predict`.
"""

from airflow.sdk import DAG, Asset, Param, chain

from mlpkg.airflow.dags import batches_param, dag_defaults, notebook_step, notebook_steps, recorded_run

NOTEBOOKS = "nbs/pipelines/flights"

with DAG(
    "flights_etl",
    doc_md=__doc__,
    schedule=None,
    params={
        "months": batches_param("2013-01..2013-10", "months"),
        "source": Param(
            "package",
            type="string",
            description="'package', or path, or http(s) or s3 URL of a CSV (also zip or gz) or Parquet file",
        ),
    },
    tags=["flights", "etl"],
    **dag_defaults(),
):
    with recorded_run():
        steps = notebook_steps(NOTEBOOKS, "10_ingest", "12_validate", "14_clean")
        # The last step updates the asset, since a training run that follows needs the split as well.
        split = notebook_step(NOTEBOOKS, "16_split", outlets=[Asset("clean/flights")], event_extra=["months"])
        chain(*steps, split)
