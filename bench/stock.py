"""The training pipeline with stock operators, executed as `mlpkg run` executes a DAG: `dag.test` in one process."""

import json
import sys
from pathlib import Path

from mlpkg.airflow.home import use_airflow
from mlpkg.airflow.local import load_dags, run_dag
from mlpkg.settings import load_settings

OUTPUT = Path("var/notebooks")


def main(conf: dict) -> int:
    "Run the DAG and return the exit code"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    settings = load_settings()
    use_airflow(settings)
    result = run_dag(settings, load_dags(settings)["flights_stock"], conf)
    return int(result.state != "success")


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
