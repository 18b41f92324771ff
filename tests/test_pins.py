"""The steps of a DAG run work on one version of each table, retries and mapped steps included. Steps are processes."""

import pandas as pd
import pytest

from mlpkg.data.lake import Lake
from mlpkg.steps.execution import StepError
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import open_pipeline_run

READ = """import scrapbook as sb
from mlpkg.data.lake import open_lake
lake = open_lake()
sb.glue("version", lake.version("raw/parcels"))
sb.glue("rows", len(lake.read("raw/parcels")))
if fail: raise RuntimeError("once")"""
WRITE = """import pandas as pd
from mlpkg.data.lake import open_lake
open_lake().write("raw/parcels", pd.DataFrame({"parcel": range(5)}))"""


@pytest.fixture
def store(project):
    "A project with a table, a step that reads it, a step that adds to it, and a pipeline run to nest them in"
    project.read = project.notebook("10_read", "fail: bool = False", READ)
    project.write = project.notebook("20_write", "rows: int = 5", WRITE)
    project.lake = Lake(project.settings.lake.root)
    project.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    return project


def test_steps_and_retries_of_a_run_read_what_its_first_step_read(store):
    parent = open_pipeline_run(store.mlflow, store.settings, "parcels", "first")

    def seen(parent: str | None) -> tuple[int, int]:
        scraps = run_step(store.read, parent_run_id=parent, settings=store.settings).scraps
        return scraps["version"], scraps["rows"]

    with pytest.raises(StepError, match="once"):
        run_step(store.read, {"fail": True}, parent_run_id=parent, settings=store.settings)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))  # another DAG, between two attempts
    assert seen(parent) == (0, 5)
    assert seen(None) == (1, 10), "a step that runs by itself reads what is newest"
    run_step(store.write, parent_run_id=parent, settings=store.settings)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    assert seen(parent) == (2, 15), "what the run has written itself"
    (used,) = {
        d.dataset.digest
        for d in store.mlflow.search_runs(
            [store.mlflow.get_run(parent).info.experiment_id],
            "tags.`mlpkg.step` = 'read' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
        )[0].inputs.dataset_inputs
    }
    assert used == "v2", "the run records the version that it read"
