"""The steps of a DAG run work on one version of each table, retries and mapped steps included. Steps are processes."""

import json
import multiprocessing
import shutil
from collections import Counter
from contextlib import nullcontext
from datetime import UTC, date, datetime, timedelta

import pandas as pd
import pyarrow as pa
import pytest

from mlpkg.data import lake as lake_module
from mlpkg.data.arrow import LakeError
from mlpkg.data.commits import OutdatedError
from mlpkg.data.lake import Lake
from mlpkg.data.ledger import Ledger
from mlpkg.data.log import table_folder
from mlpkg.data.pins import move_pin
from mlpkg.data.retention import protect_log, remove_versions
from mlpkg.data.upkeep import compact
from mlpkg.steps.execution import StepError
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import open_pipeline_run

spawn = multiprocessing.get_context("spawn")  # deltalake's runtime does not survive fork

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
        scraps = run_step(store.read, parent=parent, settings=store.settings).scraps
        return scraps["version"], scraps["rows"]

    with pytest.raises(StepError, match="once"):
        run_step(store.read, {"fail": True}, parent=parent, settings=store.settings)
    store.lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))  # another DAG, between two attempts
    assert seen(parent) == (0, 5)
    assert seen(None) == (1, 10), "a step that runs by itself reads what is newest"
    run_step(store.write, parent=parent, settings=store.settings)
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


COUNT = """import pandas as pd
from mlpkg.data.lake import open_lake
lake = open_lake()
rows = lake.read("raw/parcels", version=version or None)
if fail: raise RuntimeError("once")
lake.write("sum/parcels", pd.DataFrame({"rows": [len(rows)]}), mode="overwrite")"""


@pytest.mark.parametrize("version", ["newest", ""])
def test_a_cleared_step_does_not_bring_back_what_a_later_run_has_replaced(store, version):
    count = store.notebook("30_count", "fail: bool = False\nversion: str = ''", COUNT)
    early, late = (open_pipeline_run(store.mlflow, store.settings, "parcels", name) for name in ("early", "late"))

    def run(notebook, parent, **parameters):
        return run_step(notebook, parameters, parent=parent, settings=store.settings)

    run(store.write, early)
    with pytest.raises(StepError, match="once"):
        run(count, early, fail=True)
    run(store.write, late)
    run(count, late, version=version)
    if version:
        run(count, early, version=version)
    else:
        with pytest.raises(StepError, match="was made from version 2 of 'raw/parcels' meanwhile"):
            run(count, early)
    assert store.lake.read("sum/parcels")["rows"].tolist() == [15]


def test_a_run_that_is_over_earlier_does_not_keep_a_later_one_from_writing(store):
    count = store.notebook("30_count", "fail: bool = False\nversion: str = ''", COUNT)
    for name, rows in (("early", 10), ("late", 15), ("again", 15)):
        parent = open_pipeline_run(store.mlflow, store.settings, "parcels", name)
        if name != "again":
            run_step(store.write, parent=parent, settings=store.settings)
        run_step(count, parent=parent, settings=store.settings)
        assert store.lake.read("sum/parcels")["rows"].tolist() == [rows]


def month(value: int, *months: str) -> pd.DataFrame:
    return pd.DataFrame({"month": months, "x": value})


@pytest.fixture
def runs(root):
    "A lake, and two DAG runs in it: the earlier has read less of `clean` than the later"
    free, early, late = (Lake(root, run=run) for run in ("", "ab12", "cd34"))
    free.write("clean", month(1, "04"), mode="replace", partition={"month": "04"})
    early.version("clean")
    free.write("clean", month(2, "04", "05"), mode="replace", partition={"month": ["04", "05"]})
    return free, early, late


def made_from(lake: Lake, name: str) -> dict[str, int]:
    "The sources that the newest commit of a table names"
    said = json.loads(lake._open(name).history(1)[0].get("made_from", "{}"))
    return {source: version for source, (_, version) in said.items()}


def test_a_mend_or_an_append_by_hand_does_not_hide_what_was_made_from_later_rows(runs):
    free, early, late = runs
    both = {"month": ["04", "05"]}
    for mode, partition, rows in (("replace", {"month": "05"}, month(9, "05")), ("append", None, month(9, "07"))):
        late.write("t", late.read("clean"), mode="replace", partition=both)
        free.write("t", rows, mode=mode, partition=partition)
        early.read("clean")
        with pytest.raises(OutdatedError):
            early.write("t", month(1, "04", "05"), mode="replace", partition=both)
    free.write("t", month(9, "04"), mode="replace", partition={"month": "04"})
    early.write("t", month(1, "04"), mode="replace", partition={"month": "04"})


@pytest.mark.parametrize("added", ["01", "10"])
def test_an_append_keeps_a_replacement_only_of_the_parts_that_it_has_added_to(runs, added):
    free, early, late = runs
    free.write("t", month(0, "01"), mode="replace", partition={"month": "01"})
    early.read("clean"), late.read("clean")
    late.write("t", month(1, added))
    with pytest.raises(OutdatedError) if added == "01" else nullcontext():
        early.write("t", month(2, "01"), mode="replace", partition={"month": "01"})


@pytest.mark.parametrize(
    ("kind", "one", "same"),
    [(float, 1.0, 1), (int, 1, 1.0), (object, date(2013, 1, 1), pd.Timestamp("2013-01-01")), (str, "1", "1")],
)
@pytest.mark.parametrize("turned", [False, True])
def test_values_of_a_partition_are_compared_in_the_type_of_the_column(runs, kind, one, same, turned):
    _, early, late = runs
    early.read("clean"), late.read("clean")
    rows = pd.DataFrame({"key": pd.Series([one], dtype=kind), "x": 1})
    first, second = (same, one) if turned else (one, same)
    late.write("t", rows, mode="replace", partition={"key": first})
    with pytest.raises(OutdatedError):
        early.write("t", rows, mode="replace", partition={"key": second})


@pytest.mark.parametrize("mode", ["replace", "overwrite"])
@pytest.mark.parametrize(("place", "moment"), [(Lake, "_layout"), (lake_module, "write_deltalake")])
def test_a_table_that_somebody_else_makes_meanwhile_is_not_replaced_by_an_older_state(
    runs, monkeypatch, mode, place, moment
):
    free, early, late = runs
    rows, waiting, original = early.read("clean"), ["late"], getattr(place, moment)
    partition = {"month": ["04", "05"]} if mode == "replace" else None

    def overtaken(*args, **how):
        if waiting:
            waiting.clear()
            late.write("t", late.read("clean"), mode=mode, partition=partition)
        return original(*args, **how)

    monkeypatch.setattr(place, moment, overtaken)
    with pytest.raises(OutdatedError):
        early.write("t", rows, mode=mode, partition=partition, allow_empty=mode == "replace")
    assert not waiting and free.read("t")["x"].tolist() == [2, 2]
    assert free.versions("t")["operation"].tolist() == [mode]


def test_upkeep_of_a_source_makes_nothing_later(runs):
    free, early, late = runs
    early = Lake(free.root, run="ef56")
    free.write("clean", month(3, "04"))
    rows = early.read("clean")
    assert compact(free, "clean", more_than=1).count == 2
    protect_log(free, "clean")
    remove_versions(free, "clean", datetime.now(UTC) - timedelta(days=1))
    assert free.version("clean") > 2
    late.write("t", late.read("clean"), mode="overwrite")
    assert made_from(free, "t") == {"clean": 2}
    early.write("t", rows, mode="overwrite")


def copied(lake):
    lake.copy("clean", "t")


def numbered(lake):
    version = lake.version("clean")
    lake.write("t", lake.read("clean", version=version), mode="overwrite")


def streamed(lake):
    def batches():
        yield from lake.batches("clean")

    lake.write("t", lambda: pa.RecordBatchReader.from_batches(lake.schema("clean"), batches()), mode="overwrite")


def streamed_later(lake):
    def batches():
        yield pa.record_batch({"month": ["01"], "x": [0]})
        yield from lake.batches("clean")

    lake.write("t", lambda: pa.RecordBatchReader.from_batches(lake.schema("clean"), batches()), mode="overwrite")


@pytest.mark.parametrize("job", [streamed, streamed_later])
def test_tables_that_are_read_while_rows_are_written_are_sources_too(runs, job):
    free, early, late = runs
    job(late)
    assert made_from(free, "t") == {"clean": 1}
    with pytest.raises(OutdatedError):
        job(early)
    assert free.read("t")["x"].isin([0, 2]).all()


@pytest.mark.parametrize("job", [copied, numbered])
def test_a_version_that_is_asked_for_by_its_number_is_a_source_too(runs, job):
    free, early, late = runs
    job(late)
    assert made_from(free, "t") == {"clean": 1}
    with pytest.raises(OutdatedError):
        job(early)


def test_an_old_version_that_is_asked_for_by_its_number_is_not_a_source(runs):
    free, _, late = runs
    for lake in (free, late):
        lake.read("clean", version=0)
        lake.write("report", month(0, "04"), mode="overwrite")
        assert made_from(free, "report") == {}
    late.version("clean")
    free.write("clean", month(3, "04"), mode="replace", partition={"month": "04"})
    for asked, noted in ((0, None), (1, 1), (0, 1), (2, 2)):
        late.read("clean", version=asked)
        assert late.sources.get("clean", [0, None])[1] == noted


def derive(root, barrier, version, results):
    "One of two processes, which have read different versions and write at the same moment"
    lake = Lake(root, run=f"run{version}")
    move_pin(lake._pins, "raw/parcels", version)
    for _ in range(5):
        rows = lake.read("raw/parcels")
        barrier.wait()
        try:
            lake.write("sum/parcels", pd.DataFrame({"rows": [len(rows)]}), mode="overwrite")
            results.put((version, "written"))
        except OutdatedError:
            results.put((version, "refused"))
        barrier.wait()


@pytest.mark.parametrize("rows", [0, 1])
def test_of_two_writers_at_once_the_one_that_has_read_more_wins(root, rows):
    lake = Lake(root)
    for _ in range(2):
        lake.write("raw/parcels", pd.DataFrame({"parcel": range(5)}))
    lake.write("sum/parcels", pd.DataFrame({"rows": range(rows)}))
    barrier, results = spawn.Barrier(2), spawn.Queue()
    jobs = [spawn.Process(target=derive, args=(root, barrier, version, results)) for version in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0]
    found = Counter(results.get(timeout=10) for _ in range(10))
    assert found[1, "written"] == 5 and found[0, "refused"] >= 4
    assert lake.read("sum/parcels")["rows"].tolist() == [10]


@pytest.fixture(params=["made anew", "restored"])
def renumbered(root, request, tmp_path):
    "A table whose two versions a DAG run has pinned, and that has other rows under the same number now"
    if "://" in str(root):
        pytest.skip("the folder of the table is replaced by hand")
    lake, backup = Lake(root), tmp_path / "backup"
    lake.write("raw/parcels", month(1, "2013-01"))
    shutil.copytree(f"{lake.root}/raw/parcels", backup)
    lake.write("raw/parcels", month(2, "2013-02"))
    assert Lake(root, run="early").version("raw/parcels") == 1
    shutil.rmtree(f"{lake.root}/raw/parcels")
    if request.param == "restored":
        shutil.copytree(backup, f"{lake.root}/raw/parcels")
    else:
        lake.write("raw/parcels", month(1, "2013-01"))
    return lake


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_run_does_not_read_other_rows_that_have_the_number_of_its_version(renumbered, writes):
    for value in range(writes):
        renumbered.write("raw/parcels", month(value, "2013-03"))
    with pytest.raises(LakeError, match="works on version 1, which is not there any more.*Start a new DAG run"):
        Lake(renumbered.root, run="early").read("raw/parcels")
    assert Lake(renumbered.root, run="late").version("raw/parcels") == writes


def test_a_pin_of_an_earlier_version_of_mlpkg_holds_by_its_number(runs):
    free, early, _ = runs
    for value in range(2):
        free.write("raw/parcels", month(value, "2013-01"), mode="overwrite")
    runs, bare = Lake(f"{free.root}/_runs", run=""), {"table": "string", "version": "int64"}
    Ledger(runs, "ef56", bare).settle(lambda lines: {"table": "raw/parcels", "version": 0})
    old = Lake(free.root, run="ef56")
    assert old.read("raw/parcels")["x"].tolist() == [0]
    old.write("raw/parcels", month(2, "2013-01"), mode="overwrite")
    assert old.read("raw/parcels")["x"].tolist() == [2], "a line with a mark follows one without"


def test_a_pinned_version_whose_files_are_gone_is_an_error_in_words(root):
    lake = Lake(root)
    for value in range(2):
        lake.write("raw/parcels", month(value, "2013-01"), mode="overwrite")
        assert Lake(root, run=f"run{value}").version("raw/parcels") == value
    for path in set(lake._open("raw/parcels", 0).to_pyarrow_dataset().files):
        table_folder(lake, "raw/parcels").delete_file(path)
    with pytest.raises(LakeError, match="works on version 0, which is not there any more.*Start a new DAG run"):
        Lake(root, run="run0").read("raw/parcels")
    assert len(Lake(root, run="run1").read("raw/parcels")) == 1
