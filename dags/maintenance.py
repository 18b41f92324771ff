"""
### Maintenance: remove what nobody needs any more

Removes what is older than `retention.*` in settings.ini allows: old versions of tables, served answers, runs with their
notebooks, logs and other files of this machine; puts small files of tables together. Versions of tables that a
registered model was trained on, and the runs behind it, stay. `mlpkg tidy --dry-run` says beforehand what would go.

Step: **tidy**. Runs as `airflow.tidy_schedule` in settings.ini says. Airflow's own records are not reached from a task:
call `mlpkg tidy --only records` where the scheduler runs.
"""

from airflow.sdk import DAG, Param

from mlpkg.airflow.dags import dag_defaults, notebook_step, recorded_run
from mlpkg.settings import load_settings

NOTEBOOKS = "nbs/pipelines/maintenance"

with DAG(
    "maintenance",
    doc_md=__doc__,
    schedule=load_settings().airflow.tidy_schedule,
    params={
        "dry_run": Param(False, type="boolean", description="Only say what would be removed"),
        "only": Param(
            "", type="string", description="Parts, separated by commas: answers, tables, runs, files; empty: all"
        ),
    },
    tags=["maintenance"],
    **dag_defaults(),
):
    with recorded_run():
        notebook_step(NOTEBOOKS, "10_tidy")
