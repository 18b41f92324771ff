"""
### Diamonds: from a file to training data

Takes in a file, checks its rows against their contract, cleans them, and splits them. A batch is replaced as a whole,
so running it twice leaves one copy. It starts by itself when `diamonds_arrive` has found a file.

Steps: **ingest** -> **validate** -> **clean** -> **split**.

Tables: `raw/diamonds`, `quarantine/raw/diamonds`, `clean/diamonds`, `split/diamonds`. The last step updates the
asset `clean/diamonds`, which starts `diamonds_predict`.
"""

from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import dag_defaults, recorded_run
from mlpkg.airflow.pipelines import etl_params, etl_steps

with DAG(
    "diamonds_etl",
    doc_md=__doc__,
    # Files that diamonds_arrive has found
    schedule=[Asset("incoming/diamonds")],
    params=etl_params("package://plotnine/data/diamonds.csv"),
    tags=["diamonds", "etl"],
    **dag_defaults(),
):
    with recorded_run():
        etl_steps("diamonds")
