"""A project for each measurement: the same seeded lake, and stores of its own, ready before the clock starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from measure import BENCH, CommandError

from mlpkg.data.lake import open_lake
from mlpkg.examples.flights import seed_lake
from mlpkg.settings import load_settings
from mlpkg.testing import settings_text

ROOT = BENCH.parent
MODULES = (
    "matplotlib.pyplot, mlflow.sklearn, scrapbook, mlpkg.airflow.dags, mlpkg.models.evaluation, "
    "mlpkg.models.registry, mlpkg.models.training"
)


def clean_env(project: Path) -> dict[str, str]:
    "The environment without anything that points to another project"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLPKG_", "MLFLOW_", "AIRFLOW"))}
    own = {"MLPKG_SETTINGS": str(project / "settings.ini"), "AIRFLOW_HOME": str(project / "var" / "airflow")}
    return kept | own | {"COLUMNS": "120", "NO_COLOR": "1"}


def prepare_stores(base: Path, dags: tuple[Path, ...] = ()) -> None:
    "A project with settings, DAGs and empty stores"
    (base / "dags").mkdir(parents=True)
    for dag in dags:
        shutil.copy(dag, base / "dags")
    (base / "settings.ini").write_text(settings_text())  # no thresholds: whatever wins is registered, in every variant
    make_stores = (
        "from mlpkg.airflow.home import prepare_database, use_airflow; from mlpkg.settings import load_settings;"
        "from mlpkg.steps.tracking import client; s = load_settings(); client(s); use_airflow(s); prepare_database(s);"
        f"import {MODULES}"  # bytecode compiled and files read, so that the first variant does not pay for all
    )
    done = subprocess.run(
        [sys.executable, "-c", make_stores], cwd=base, env=clean_env(base), capture_output=True, text=True
    )
    if done.returncode:
        raise CommandError(f"the stores could not be created:\n{done.stderr[-3000:]}")


def prepare(base: Path, months: str) -> int:
    "Make the project that all others are copied from, and return the number of flights in its lake"
    prepare_stores(base)
    shutil.copytree(ROOT / "nbs" / "pipelines", base / "nbs" / "pipelines")
    lake = seed_lake(open_lake(load_settings(file=base / "settings.ini", env={})), months, rows=sys.maxsize)
    return lake.count("split/flights")


def copy(base: Path, project: Path, dag: Path | None) -> None:
    "A fresh project with one DAG, or none"
    shutil.copytree(base, project)
    if dag:
        shutil.copy(dag, project / "dags")


def outcome(project: Path) -> dict[str, str]:
    "What a variant found, to the last digit: validation score of every candidate, winner, metrics of the winner"
    from mlflow import MlflowClient

    uri = f"sqlite:///{project}/var/mlflow.db"
    client = MlflowClient(uri, uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    scores = sorted(repr(run.data.metrics["valid_roc_auc"]) for run in runs if "trial_roc_auc" in run.data.metrics)
    tags = client.get_model_version("flights", "1").tags
    kept = {name: value for name, value in tags.items() if name.startswith("metric.") or name == "candidate"}
    return {"validation": ", ".join(scores), **dict(sorted(kept.items()))}
