"""
### Diamonds: batch predictions

Scores each batch that arrives with the champion. A batch is replaced as a whole, so running it twice leaves one copy;
rows that break the model's contract go to quarantine with the reason. Without a champion the step is skipped.

Step: **predict**. Tables: `predictions/diamonds`, `quarantine/predictions/diamonds`.
Runs whenever `diamonds_etl` has brought in rows; with a `source` of its own it predicts the rows of any file.
"""

from airflow.sdk import DAG, Asset

from mlpkg.airflow.dags import dag_defaults, recorded_run
from mlpkg.airflow.pipelines import predict_params, predict_steps

with DAG(
    "diamonds_predict",
    doc_md=__doc__,
    schedule=[Asset("clean/diamonds")],
    params=predict_params("diamonds", binary=False),
    tags=["diamonds", "predict"],
    **dag_defaults(),
):
    with recorded_run():
        predict_steps("diamonds")
