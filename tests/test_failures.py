"""A mapped step that fails in part, and a step after it that goes on with the others: whole DAG runs, in a process."""

import pytest

DAG = """
from airflow.sdk import DAG, Param

from mlpkg.airflow.dags import mapped_notebook_step, notebook_step, recorded_run

with DAG("some", params={"sizes": Param([1, 2, 3], type="array"), "bad": Param([2], type="array")}):
    with recorded_run():
        counts = mapped_notebook_step("notebooks", "10_count", over="sizes", parameter="rows")
        trained = {"counts": counts.output}
        notebook_step("notebooks", "30_total", parameters=trained, trigger_rule="all_done_min_one_success")
"""
COUNT = "import scrapbook as sb\nassert rows not in bad, f'{rows} rows are too many'\nsb.glue('rows', rows)"
TOTAL = """import scrapbook as sb
from mlpkg.steps.failures import failed_steps
failed = failed_steps("count")
sb.glue("total", sum(one["rows"] for one in counts))
sb.glue("failed", dict(zip(failed["step"], failed["error"])))"""


@pytest.fixture
def some(project):
    (project.root / "dags" / "some.py").write_text(DAG)
    project.notebook("10_count", "rows: int = 1\nbad: list = []", COUNT)
    project.notebook("30_total", "counts: list = []", TOTAL)
    return project


def test_a_mapped_step_that_fails_in_part_is_named_and_the_others_go_on(some):
    output = some.mlpkg("run", "some")
    (run,) = some.pipeline_runs("some")
    steps = some.steps(run)
    assert {name: step.info.status for name, step in steps.items()} == {
        "count [1]": "FINISHED", "count [2]": "FAILED", "count [3]": "FINISHED", "total": "FINISHED",
    }  # fmt: skip
    assert steps["total"].data.metrics["total"] == 4
    shown = str(some.stored(steps["total"]).cells[-1].outputs)
    assert "count [2]" in shown and "AssertionError: 2 rows are too many" in shown
    assert (run.info.status, run.data.tags["mlpkg.failed_steps"]) == ("FINISHED", "count [2]")
    assert "some succeeded" in output and "2 rows are too many" in output


def test_a_mapped_step_that_fails_altogether_fails_the_run(some):
    some.mlpkg("run", "some", "-p", "bad=[1, 2, 3]", code=1)
    (run,) = some.pipeline_runs("some")
    assert run.info.status == "FAILED" and "total" not in some.steps(run)


NUMBERED = """
from airflow.sdk import DAG

from mlpkg.airflow.dags import mapped_notebook_step, notebook_step, recorded_run

with DAG("numbered", params={"sizes": [1, 2], "bad": [1]}):
    with recorded_run():
        for number in ("load_1", "load_2"):
            notebook_step("notebooks", f"10_{number}")
        counts = mapped_notebook_step("notebooks", "10_load", over="sizes", parameter="rows")
        counts >> notebook_step("notebooks", "20_report", trigger_rule="all_done_min_one_success")
"""


def numbered(project, first: str, second: str):
    "Two ordinary tasks, named like the instances of a mapped one beside them"
    (project.root / "dags" / "numbered.py").write_text(NUMBERED)
    project.notebook("10_load", "rows: int = 1\nbad: list = []", COUNT)
    project.notebook("10_load_1", "x: int = 1", first)
    project.notebook("10_load_2", "x: int = 1", second)
    return project


def test_ordinary_steps_with_numbers_are_not_instances_of_a_mapped_one(project):
    output = numbered(project, "1 / 0", "2 / 1").mlpkg("run", "numbered", code=1)
    (run,) = project.pipeline_runs("numbered")
    assert "numbered failed" in output and run.info.status == "FAILED"
    assert "failed" in project.look("runs", "--dag", "numbered").lower()


def test_a_mapped_step_may_fail_in_part_beside_ordinary_ones_with_numbers(project):
    numbered(project, "1 / 1", "2 / 1").mlpkg("run", "numbered")
    (run,) = project.pipeline_runs("numbered")
    assert (run.info.status, run.data.tags["mlpkg.failed_steps"]) == ("FINISHED", "load [1]")
