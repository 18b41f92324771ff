"""
### Flights: from source to training data

Takes the flights that left New York in the given months, checks them against their contract, cleans them, joins weather
and planes, and splits them by time. Each month is replaced as a whole, so running it twice leaves one copy.

Steps: **ingest** -> **validate** -> **clean** -> **split**.

Tables: `raw/*`, `quarantine/*`, `clean/flights`, `split/flights`.
"""

from datetime import datetime, timedelta

from airflow.sdk import DAG, Param

from mlpkg.airflow import notebook_steps, recorded_run

with DAG(
    "flights_etl",
    doc_md=__doc__,
    schedule=None,
    start_date=datetime(2013, 1, 1),
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=30)},
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
        notebook_steps("nbs/pipelines/flights", "10_ingest", "12_validate", "14_clean", "16_split")
