"""
### Flights: from source to training data

Takes the flights that left New York in the given months, checks them against their contract, cleans them, joins weather
and planes, and splits them by time. Each month is replaced as a whole, so running it twice leaves one copy.

Steps: **ingest** -> **validate** -> **clean** -> **split**.

Tables: `raw/*`, `quarantine/*`, `clean/flights`, `split/flights`. The last step updates the asset `clean/flights`,
which starts `flights_predict`.
"""

from datetime import datetime

from airflow.sdk import DAG, Asset, Param, chain

from mlpkg.airflow.dags import notebook_step, notebook_steps, recorded_run, step_defaults

NOTEBOOKS = "nbs/pipelines/flights"

with DAG(
    "flights_etl",
    doc_md=__doc__,
    schedule=None,
    start_date=datetime(2013, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args=step_defaults(),
    params={
        "months": Param(
            "2013-01..2013-10", type="string", description="Months: 2013-01, 2013-01..2013-10, or 2013-01,2013-05"
        ),
        "source": Param(
            "package", type="string", description="'package', or path, URL or s3:// of CSV, zipped CSV or Parquet"
        ),
    },
    tags=["flights", "etl"],
):
    with recorded_run():
        steps = notebook_steps(NOTEBOOKS, "10_ingest", "12_validate", "14_clean")
        # Said by the last step, since a training that follows needs the split as well.
        split = notebook_step(NOTEBOOKS, "16_split", outlets=[Asset("clean/flights")], event_extra=["months"])
        chain(*steps, split)
