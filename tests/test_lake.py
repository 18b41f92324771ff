"""What a page cannot show of the lake: several processes writing at once, memory, what is left on disk, and S3.

The S3 tests run where AWS_ENDPOINT_URL (and credentials) point to a server; they make a bucket of their own.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

import mlpkg.data.commits
import mlpkg.data.lake
import mlpkg.data.log
import mlpkg.data.pins
import mlpkg.data.rewriting
import mlpkg.data.together
from mlpkg.data.arrow import LakeError
from mlpkg.data.commits import commit_options
from mlpkg.data.lake import Lake, open_lake
from mlpkg.data.ledger import Ledger
from mlpkg.data.log import Mark, UncertainError, find_write
from mlpkg.data.retention import needed_versions, readable_versions, trim_log
from mlpkg.data.spill import Spill, replayable
from mlpkg.data.together import Waiting, make_follower, put_down, refused_rows, replace_together
from mlpkg.data.upkeep import compact, tidy_lake
from mlpkg.recipes.delivery import write_batches
from mlpkg.settings import load_settings
from mlpkg.testing import age_table

spawn = multiprocessing.get_context("spawn")  # deltalake's runtime does not survive fork
writers, writes = 3, 6


def frame(month: str, writer: int = 0, write: int = 0, rows: int = 5) -> pd.DataFrame:
    return pd.DataFrame({"month": month, "writer": writer, "write": write, "row": range(rows)})


def write_often(root, barrier, writer, mode, months):
    "One of several processes: all start at once, on a table that does not exist yet"
    lake = Lake(root)
    barrier.wait()
    for write in range(writes):
        month = months[writer]
        partition = None if mode != "replace" else {"month": month}
        lake.write("raw/flights", frame(month, writer, write), mode, partition, partition_by=["month"])


def race(root, mode, months):
    "Run the writers and return the rows of the table afterwards"
    barrier = spawn.Barrier(writers)
    jobs = [spawn.Process(target=write_often, args=(root, barrier, i, mode, months)) for i in range(writers)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * writers
    return Lake(root).read("raw/flights")


def test_concurrent_appends_lose_and_duplicate_nothing(root):
    rows = race(root, "append", ["2013-01"] * writers)
    assert len(rows) == writers * writes * 5
    assert not rows.duplicated().any()


def test_concurrent_replacements_of_different_months_keep_every_month(root):
    rows = race(root, "replace", ["2013-01", "2013-02", "2013-03"])
    assert rows.groupby("month").size().to_dict() == {"2013-01": 5, "2013-02": 5, "2013-03": 5}
    assert set(rows["write"]) == {writes - 1}


@pytest.mark.parametrize("mode", ["replace", "overwrite"])
def test_concurrent_replacements_of_the_same_rows_leave_those_of_one_writer(root, mode):
    rows = race(root, mode, ["2013-01"] * writers)
    assert len(rows) == 5
    assert rows["writer"].nunique() == 1 and set(rows["row"]) == set(range(5))
    assert set(Lake(root).versions("raw/flights")["version"]) == set(range(writers * writes))


def deliver_often(root, barrier, writer):
    "One of several processes that bring batches whose columns change each time"
    lake = Lake(root)
    barrier.wait()
    for write in range(writes):
        rows = pd.DataFrame({"from_batch": [f"w{writer}-{write}"] * 5, "row": range(5)})
        write_batches(lake, "raw/parcels", rows.assign(**{"even" if write % 2 else "odd": 1.0}), [f"w{writer}-{write}"])


def test_batches_whose_columns_differ_lose_none_that_others_bring_at_the_same_time(root):
    barrier = spawn.Barrier(writers)
    jobs = [spawn.Process(target=deliver_often, args=(root, barrier, writer)) for writer in range(writers)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * writers
    counts = Lake(root).read("raw/parcels")["from_batch"].value_counts().to_dict()
    assert counts == {f"w{writer}-{write}": 5 for writer in range(writers) for write in range(writes)}


@pytest.mark.parametrize("others", [{"row": [3]}, {"row": [3], "height": [2.0]}])
def test_a_batch_that_comes_in_while_columns_change_stays(root, monkeypatch, others):
    lake, write = Lake(root), mlpkg.data.lake.write_deltalake
    write_batches(lake, "raw/parcels", pd.DataFrame({"from_batch": ["a"], "row": [1]}), ["a"])

    def overtaken(*args, **how):
        monkeypatch.setattr(mlpkg.data.lake, "write_deltalake", write)  # as the others do, and the next attempt
        write_batches(Lake(root), "raw/parcels", pd.DataFrame({"from_batch": ["c"], **others}), ["c"])
        return write(*args, **how)

    monkeypatch.setattr(mlpkg.data.lake, "write_deltalake", overtaken)
    write_batches(lake, "raw/parcels", pd.DataFrame({"from_batch": ["b"], "row": [2], "width": [1.5]}), ["b"])
    rows = lake.read("raw/parcels").sort_values("from_batch", ignore_index=True)
    assert rows["from_batch"].tolist() == ["a", "b", "c"] and rows["row"].tolist() == [1, 2, 3]
    assert list(rows) == ["from_batch", "row", "width"] and rows["width"].isna().tolist() == [True, False, True]


def replace_often(root, barrier, writer, months):
    "One of several processes that replace rows of two tables; each write has a number of its own in both"
    lake = Lake(root)
    barrier.wait()
    for write in range(writes):
        rows = frame(months[writer], writer, write)
        aside = rows if write % 2 else rows.head(0)
        replace_together(lake, {"raw/flights": rows, "aside/flights": aside}, {"month": months[writer]})


@pytest.mark.parametrize("months", [["2013-01"] * 3, ["2013-01", "2013-02", "2013-03"]])
def test_tables_that_are_replaced_together_end_with_the_same_writer_whoever_else_writes(root, months):
    barrier = spawn.Barrier(writers + 1)
    jobs = [spawn.Process(target=replace_often, args=(root, barrier, i, months)) for i in range(writers)]
    for job in jobs:
        job.start()
    barrier.wait()
    lake, seen = Lake(root), 0
    while any(job.is_alive() for job in jobs):  # a reader that looks at the first table before and after the second
        if not (lake.exists("raw/flights") and lake.exists("aside/flights")):
            continue
        month = [("month", "==", months[0])]
        before, aside, after = (lake.read(name, ["writer", "write"], month) for name in TOGETHER)
        if before.equals(after) and len(after) and after["writer"].nunique() == 1:
            expected = after if after["write"].iloc[0] % 2 else after.head(0)
            pd.testing.assert_frame_equal(aside, expected)
            seen += 1
    assert [job.exitcode for job in jobs] == [0] * writers
    rows, aside = lake.read("raw/flights"), lake.read("aside/flights")
    assert len(rows) == 5 * len(set(months)) and set(rows["write"]) == {writes - 1}
    pd.testing.assert_frame_equal(rows, aside)
    assert seen > 0 and waiting(root) == []


@pytest.mark.skipif(sys.platform != "linux", reason="processors are taken away by a call of Linux")
def test_two_tables_change_together_on_a_machine_with_one_processor(tmp_path):
    program = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tests.test_lake import Lake, frame, replace_together\n"
        "tables = dict.fromkeys(('raw/flights', 'aside/flights'), frame('2013-01'))\n"
        "lake = Lake(sys.argv[1])\n"
        "for _ in range(2): replace_together(lake, tables, {'month': '2013-01'}, check=lake.tables)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lake")]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=60)  # noqa: S603
    assert Lake(tmp_path / "lake").count("aside/flights") == 5


TOGETHER = ("raw/flights", "aside/flights", "raw/flights")


def waiting(root) -> list[str]:
    "What is left in the waiting room"
    return Lake(f"{root}/_waiting").tables()


@pytest.mark.parametrize("committed", [False, True])
def test_a_writer_of_two_tables_that_is_killed_has_changed_both_or_none(root, committed):
    lake, month = Lake(root), {"month": "2013-01"}
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01", rows=1)}, month)
    program = (
        "import os, signal, sys; import mlpkg.data.lake as lake, mlpkg.data.together as together\n"
        "from tests.test_lake import frame\n"
        "def killed(*args): os.kill(os.getpid(), signal.SIGKILL)\n"
        "commit, wait = lake.Lake._commit, together.put_down\n"
        "if sys.argv[2] == 'True': lake.Lake._commit = lambda *args, **more: (commit(*args, **more), killed())\n"
        "else: together.put_down = lambda *args: (wait(*args), killed())\n"
        "tables = {'raw/flights': frame('2013-01', 7), 'aside/flights': frame('2013-01', 7, rows=3)}\n"
        "together.replace_together(lake.Lake(sys.argv[1]), tables, {'month': '2013-01'})"
    )
    done = subprocess.run([sys.executable, "-c", program, root, str(committed)], cwd=Path(__file__).parents[1])  # noqa: S603
    assert done.returncode == -9 and len(waiting(root)) == 1
    found = lake.read("raw/flights"), lake.read("aside/flights")
    assert tuple(set(rows["writer"]) for rows in found) == (({7}, {7}) if committed else ({0}, {0}))
    assert tuple(map(len, found)) == ((5, 3) if committed else (5, 1))
    replace_together(lake, {"raw/flights": frame("2013-01", 8), "aside/flights": frame("2013-01", 8, rows=2)}, month)
    assert (lake.count("raw/flights"), lake.read("aside/flights")["writer"].tolist()) == (5, [8, 8])


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_rows_that_wait_and_are_lost_are_named_and_keep_nobody_from_reading(tmp_path, caplog, damage):
    "Their writer died before he brought them in, and a file of theirs is gone or torn"
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    before = replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)
    lake.write("raw/flights", frame("2013-01", 7), "replace", month)
    mark = DeltaTable(f"{tmp_path}/raw/flights").history(1)[0]["write_id"]
    rows = pa.Table.from_pandas(frame("2013-01", 7), preserve_index=False)
    put_down(lake, Waiting("aside/flights", mark, month, before), rows.to_reader())
    room = tmp_path / "_waiting" / "aside/flights" / mark
    damage(next(room.glob("*.parquet")))
    assert lake.count("aside/flights") == lake.count("aside/flights") == 5
    [told] = [one.message for one in caplog.records if one.levelname == "ERROR"]
    assert "'aside/flights'" in told and str(room) in told and "are gone or torn" in told
    [left] = [one for one in tidy_lake(lake, datetime.now(UTC) - timedelta(days=9)) if one.failed]
    assert left.where == "_waiting" and str(room) in left.note
    age_table(Lake(tmp_path / "_waiting"), f"aside/flights/{mark}", days=10)
    list(tidy_lake(lake, datetime.now(UTC) - timedelta(days=9)))
    assert not room.exists() and refused_rows(lake, "aside/flights") == []


def test_rows_that_wait_in_a_store_that_does_not_answer_are_not_lost(tmp_path, monkeypatch):
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)
    rows = pa.Table.from_pandas(frame("2013-01", 7), preserve_index=False)
    put_down(lake, Waiting("aside/flights", "a1b2", month), rows.to_reader())

    files = mlpkg.data.together._files(lake)

    def unreachable(asked):
        if isinstance(asked, list):
            raise OSError("connection reset")
        return files.get_file_info(asked)

    monkeypatch.setattr(mlpkg.data.together, "_files", lambda lake: SimpleNamespace(get_file_info=unreachable))
    with pytest.raises(OSError, match="connection reset"):
        lake.read("aside/flights")
    monkeypatch.undo()
    assert lake.count("aside/flights") == 5 and refused_rows(lake, "aside/flights") == []


def tear(root: Path, mark: str) -> Path:
    "Rows that wait, of whose log half a line is left"
    room = root / "_waiting/aside/flights" / mark
    (room / "_delta_log").mkdir(parents=True)
    (room / "_delta_log" / f"{0:020}.json").write_text("half a line")
    return room


def test_rows_that_are_lost_before_their_commit_are_no_loss(tmp_path, caplog):
    "Their writer was killed, so that nothing was written; whole or torn, they go when they are old"
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)
    rooms = [tear(tmp_path, "a1b2"), tmp_path / "_waiting/aside/flights/c3d4"]
    rows = pa.Table.from_pandas(frame("2013-01", 7), preserve_index=False)
    put_down(lake, Waiting("aside/flights", "c3d4", month, {"raw/flights": 0}), rows.to_reader())
    next(rooms[1].glob("*.parquet")).unlink()
    assert lake.count("aside/flights") == 5 and refused_rows(lake, "aside/flights") == []
    assert not [one for one in tidy_lake(lake, datetime.now(UTC) - timedelta(days=9)) if one.failed]
    assert caplog.records == [] and all(room.exists() for room in rooms)
    age_table(Lake(tmp_path / "_waiting"), "aside/flights/c3d4", days=10)
    for room in rooms:
        for path in [*room.rglob("*"), room]:
            os.utime(path, (0, 0))
    list(tidy_lake(lake, datetime.now(UTC) - timedelta(days=9)))
    assert not any(room.exists() for room in rooms)


def test_a_commit_that_comes_after_its_rows_were_lost_makes_them_a_loss(tmp_path, caplog):
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)
    room = tear(tmp_path, "a1b2")
    for _ in range(2):
        assert lake.count("aside/flights") == 5 and caplog.records == []
    how = commit_options("append", [], False, True, {"write_id": "a1b2"})
    write_deltalake(DeltaTable(tmp_path / "raw/flights"), pa.Table.from_pandas(frame("2013-01")), **how)
    DeltaTable(tmp_path / "raw/flights").create_checkpoint()
    (tmp_path / "raw/flights/_delta_log" / f"{0:020}.json").write_text("commitInfo: not looked at again")
    for _ in range(2):
        assert lake.count("aside/flights") == 5
    [told] = [one.message for one in caplog.records if one.levelname == "ERROR"]
    assert str(room) in told


def test_rows_whose_removal_was_interrupted_are_gone(tmp_path):
    "The table does not take them, and they are old: what is left of them is not told as rows that are torn"
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)
    mark = DeltaTable(f"{tmp_path}/raw/flights").history(1)[0]["write_id"]
    put_down(lake, Waiting("aside/others", mark, month), pa.table({"weight": [0.5]}).to_reader())
    make_follower(lake, "aside/others", pa.schema([("month", pa.string())]), ["month"], "raw/flights")
    assert lake.count("aside/others") == 0 and len(refused_rows(lake, "aside/others")) == 1
    age_table(Lake(tmp_path / "_waiting"), f"aside/others/{mark}", days=10)
    program = (
        "import os, signal, sys; from datetime import UTC, datetime, timedelta; from pyarrow.fs import FileSystem\n"
        "from mlpkg.data import retention, together; from mlpkg.data.lake import Lake\n"
        "def killed(*given): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def first(lake, name, paths): log_table(lake, name).delete_file(paths[0]); killed()\n"
        "log_table, files = retention.stored_folder, together._files\n"
        "class Stops:\n"
        "    def __init__(self, lake): self.files = files(lake)\n"
        "    def __getattr__(self, name): return killed if name == 'delete_dir' else getattr(self.files, name)\n"
        "together._files, retention._delete_files = Stops, first\n"
        "retention.remove_waiting(Lake(sys.argv[1]), datetime.now(UTC) - timedelta(days=9))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == -9
    assert refused_rows(lake, "aside/others") == [] and (tmp_path / "_waiting/aside/others" / mark).exists()


def test_a_torn_log_of_rows_that_wait_is_named_and_keeps_nobody_from_reading(tmp_path, caplog):
    "Their machine lost its power while they were put down"
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    both = {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}
    replace_together(lake, both, month)
    lake.write("raw/flights", frame("2013-01", 7), "replace", month)
    mark = DeltaTable(f"{tmp_path}/raw/flights").history(1)[0]["write_id"]
    room = tear(tmp_path, mark)
    assert lake.count("aside/flights") == lake.count("aside/flights") == 5
    [told] = [one.message for one in caplog.records if one.levelname == "ERROR"]
    assert "'aside/flights'" in told and str(room) in told and "cannot be read" in told
    assert replace_together(lake, both, month)["aside/flights"] == lake.version("aside/flights")
    trim_log(lake, "raw/flights", lake.version("raw/flights"), limit=0)
    [left] = [one for one in tidy_lake(lake, datetime.now(UTC) - timedelta(days=9)) if one.failed]
    assert left.where == "_waiting" and str(room) in left.note
    for path in [*room.rglob("*"), room]:
        os.utime(path, (0, 0))
    list(tidy_lake(lake, datetime.now(UTC) - timedelta(days=9)))
    assert not room.exists() and refused_rows(lake, "aside/flights") == []


def test_rows_that_somebody_else_brings_in_while_their_log_is_read_are_not_torn(tmp_path, monkeypatch, caplog):
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)
    rows = pa.Table.from_pandas(frame("2013-01", 7), preserve_index=False)
    put_down(lake, Waiting("aside/flights", "a1b2", month), rows.to_reader())

    def brought_in(look):
        shutil.rmtree(tmp_path / "_waiting/aside/flights/a1b2")
        raise DeltaError("a part of the log is gone")

    monkeypatch.setattr(mlpkg.data.together, "look_again", brought_in)
    assert lake.count("aside/flights") == 5 and caplog.records == []


def test_a_writer_whose_rows_were_torn_while_they_waited_hears_of_it(tmp_path, monkeypatch):
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    both = {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}
    replace_together(lake, both, month)

    def torn(lake, waiting, rows):
        put_down(lake, waiting, rows)
        room = tmp_path / "_waiting" / waiting.name / waiting.mark
        (room / "_delta_log" / f"{0:020}.json").write_text("half a line")

    monkeypatch.setattr(mlpkg.data.together, "put_down", torn)
    with pytest.raises(LakeError, match="'aside/flights' has not got rows .* cannot be read"):
        replace_together(lake, both, month)


@pytest.mark.parametrize("made", ["dropped", "made anew"])
def test_a_write_is_found_in_a_table_that_was_made_anew_between_its_attempts(tmp_path, monkeypatch, made):
    lake, write, attempts = Lake(tmp_path), mlpkg.data.lake.write_deltalake, []
    for _ in range(5):
        lake.write("raw/flights", frame("2013-01"))

    def refused_once(*given, **more):
        attempts.append(given)
        if len(attempts) == 1:
            shutil.rmtree(tmp_path / "raw/flights")
            if made == "made anew":
                write(f"{tmp_path}/raw/flights", pa.Table.from_pandas(frame("2013-02"), preserve_index=False))
            raise CommitFailedError("somebody else was faster")
        write(*given, **more)
        if made == "made anew":
            raise CommitFailedError("the answer is lost, and the commit is there")

    monkeypatch.setattr(mlpkg.data.lake, "write_deltalake", refused_once)
    version = lake.write("raw/flights", frame("2013-03", 7))
    months = lake.read("raw/flights")["month"].unique().tolist()
    assert (version, sorted(months)) == ((0, ["2013-03"]) if made == "dropped" else (1, ["2013-02", "2013-03"]))


def test_a_commit_that_adds_no_rows_is_seen_by_whoever_looks_before_the_commit(tmp_path):
    "All rows of the other one were refused, so that its commit has no file that contradicts ours"
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    both = ("predictions/flights", "aside/flights")
    replace_together(lake, dict.fromkeys(both, frame("2013-02")), {"month": "2013-02"})
    code = (
        "import sys; import pandas as pd; from mlpkg.data.lake import Lake\n"
        "from mlpkg.data.together import replace_together\n"
        "rows = Lake(sys.argv[1]).read('aside/flights').assign(month='2013-01', writer=8)\n"
        "replace_together(Lake(sys.argv[1]), {'predictions/flights': rows[:0], 'aside/flights': rows}, "
        "{'month': '2013-01'})"
    )
    looks = []

    def look():
        looks.append(lake.count("aside/flights"))
        if len(looks) == 1:
            subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
        elif (lake.read("aside/flights")["month"] == "2013-01").any():
            raise LakeError("somebody else was faster")

    with pytest.raises(LakeError, match="somebody else was faster"):
        replace_together(lake, dict.fromkeys(both, frame("2013-01", 7)), month, look)
    assert set(lake.read("aside/flights").query("month == '2013-01'")["writer"]) == {8}


def test_a_claim_gets_through_although_others_commit_all_the_time(tmp_path):
    "They replace another month, before and behind each look"
    lake, draws, looks, both = Lake(tmp_path), [], [], ("predictions/flights", "aside/flights")

    def others():
        replace_together(lake, dict.fromkeys(both, frame("2013-02", 8)), {"month": "2013-02"})

    def rows():
        draws.append(others())
        yield pa.RecordBatch.from_pandas(frame("2013-01", 7))
        others()

    replace_together(lake, dict.fromkeys(both, frame("2013-01")), {"month": "2013-01"})
    replace_together(
        lake, {both[0]: rows, both[1]: frame("2013-01", 7)}, {"month": "2013-01"}, lambda: looks.append(others())
    )
    assert (len(draws), len(looks)) == (1, 1)
    assert all(lake.read(name).groupby("month")["writer"].unique().map(list).tolist() == [[7], [8]] for name in both)


def test_a_claim_on_rows_that_were_taken_meanwhile_is_looked_at_again(tmp_path):
    "All that the other one brings is in the second table, where nothing of ours contradicts it"
    lake, looks, both = Lake(tmp_path), [], ("predictions/flights", "aside/flights")
    rows, month = pa.Table.from_pandas(frame("2013-01", 7)), {"month": ["2013-01", "2013-02"]}
    replace_together(lake, {both[0]: rows[:0], both[1]: rows}, month)

    def look():
        if looks.append(lake.count(both[1])) or len(looks) == 1:
            replace_together(lake, {both[0]: rows[:0], both[1]: rows[:2]}, {"month": "2013-01"})

    replace_together(lake, dict.fromkeys(both, rows[:1]), month, look)
    assert looks == [5, 2]


def test_claims_cost_a_table_little_and_not_for_ever(tmp_path, monkeypatch):
    "Each name of a claim is a line in every checkpoint from then on"
    lake, both = Lake(tmp_path), ("predictions/flights", "aside/flights")
    rows = pa.table({"month": ["2013-01", "2013-01", "2013-02"], "region": ["n", "s", "s"], "row": [1, 2, 3]})
    part = {"region": ["n", "s"], "month": ["2013-01", "2013-02"]}

    def claims() -> int:
        table = DeltaTable(tmp_path / both[0])
        table.create_checkpoint()
        (newest,) = (tmp_path / both[0] / "_delta_log").glob(f"{table.version():020}.checkpoint.parquet")
        return sum(one is not None for one in pq.read_table(newest)["txn"].to_pylist())

    replace_together(lake, dict.fromkeys(both, rows), part)
    replace_together(lake, dict.fromkeys(both, rows), part)
    assert claims() == 4
    month_ago = time.time() - 30 * 86400
    with monkeypatch.context() as patch:
        patch.setattr(mlpkg.data.commits.time, "time", lambda: month_ago)
        replace_together(lake, dict.fromkeys(both, rows), part)
    assert claims() == 0


def test_months_of_one_depot_are_replaced_by_many_at_once(tmp_path, monkeypatch):
    lake, both = Lake(tmp_path), ("predictions/flights", "aside/flights")
    monkeypatch.setattr(mlpkg.data.log, "_waits", [0.0, 0.0])
    looks = []

    def replace(month, check=None):
        rows = pa.table({"month": [month], "depot": ["EU"], "row": [1]})
        replace_together(lake, dict.fromkeys(both, rows), {"month": month, "depot": "EU"}, check)

    replace("01")
    replace("02", lambda: looks.append(replace("03")))
    assert len(looks) == 1
    assert sorted(lake.read(both[1])["month"]) == ["01", "02", "03"]


def test_a_claim_that_is_never_let_in_says_so(tmp_path, monkeypatch):
    lake, both = Lake(tmp_path), ("predictions/flights", "aside/flights")
    rows, month = pa.Table.from_pandas(frame("2013-01", 7)), {"month": "2013-01"}
    replace_together(lake, dict.fromkeys(both, rows), month)
    monkeypatch.setattr(mlpkg.data.log, "_waits", [0.0, 0.0])
    with pytest.raises(LakeError, match="table 'predictions/flights': .* Nothing was written: run the step again"):
        replace_together(lake, dict.fromkeys(both, rows), month, lambda: lake.write(both[0], rows, "replace", month))
    assert (lake.count(both[1]), waiting(tmp_path)) == (5, [])


def test_a_replacement_that_is_refused_for_another_reason_says_which(tmp_path, monkeypatch):
    "Somebody changes the properties of the table all the time"
    lake, both = Lake(tmp_path), ("predictions/flights", "aside/flights")
    rows, month = pa.Table.from_pandas(frame("2013-01", 7)), {"month": "2013-01"}
    replace_together(lake, dict.fromkeys(both, rows), month)
    monkeypatch.setattr(mlpkg.data.log, "_waits", [0.0, 0.0])

    def change():
        DeltaTable(tmp_path / both[0]).alter.set_table_properties({"delta.appendOnly": "false"})

    with pytest.raises(LakeError, match="the commit was refused: .*[Mm]etadata .*when nobody else changes the table"):
        replace_together(lake, dict.fromkeys(both, rows), month, change)


def test_a_commit_that_was_reported_as_failed_counts_for_both_tables(tmp_path, monkeypatch):
    lake, month, commit = Lake(tmp_path), {"month": "2013-01"}, Lake._commit
    replace_together(lake, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}, month)

    def lost(*given, **more):
        commit(*given, **more)
        raise OSError("the connection was lost after the commit")

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "_commit", lost)
        both = {"raw/flights": frame("2013-01", 7), "aside/flights": frame("2013-01", 7)}
        assert replace_together(lake, both, month)["raw/flights"] == 1
        assert lake.write("raw/others", frame("2013-01")) == 0
    assert {*lake.read("raw/flights")["writer"], *lake.read("aside/flights")["writer"]} == {7}


@pytest.fixture
def connection(monkeypatch):
    "Says whether the store can be reached, and what is lost right behind a commit: its answer, and the connection"
    here = SimpleNamespace(up=True, lost="")

    class Table(DeltaTable):
        def __init__(self, *given, **more):
            if not here.up:
                raise OSError("connection reset")
            super().__init__(*given, **more)

    commit = Lake._commit

    def committed(*given, **more):
        commit(*given, **more)
        here.up = not here.lost
        if here.lost == "answer":
            raise OSError("connection reset after the commit was sent")

    monkeypatch.setattr(mlpkg.data.log, "DeltaTable", Table)
    monkeypatch.setattr(Lake, "_commit", committed)
    return here


@pytest.mark.parametrize("lost", ["answer", "connection"])
@pytest.mark.parametrize("several", [False, True])
def test_a_write_whose_connection_stays_lost_says_what_is_known_of_it(tmp_path, connection, lost, several):
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    both = {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}
    replace_together(lake, both, month)
    connection.lost = lost
    with pytest.raises(LakeError) as caught:
        if several:
            replace_together(lake, dict.fromkeys(both, frame("2013-01", 7)), month)
        else:
            lake.write("raw/flights", frame("2013-01", 7))
    assert isinstance(caught.value, UncertainError) == (lost == "answer")
    expected = {
        "answer": "It may be written: .* after version 0",
        "connection": "the rows are written, .* again: lake.",
    }
    assert caught.match(expected[lost]) and "connection reset" in str(caught.value.__cause__)
    connection.up, connection.lost = True, ""
    assert lake.count("raw/flights", 1) == (5 if several else 10) and lake.version("raw/flights") == 1
    assert set(lake.read("aside/flights")["writer"]) == ({7} if several else {0})
    assert waiting(tmp_path) == []


def test_what_was_wrong_before_a_commit_is_said_although_the_connection_is_lost_since(tmp_path, connection):
    lake, month = Lake(tmp_path), {"month": "2013-01"}
    both = {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01")}
    replace_together(lake, both, month)

    def look():
        connection.up = False
        raise LakeError("somebody else was faster")

    with pytest.raises(LakeError, match="somebody else was faster"):
        replace_together(lake, both, month, look)

    def rows():
        yield from pa.Table.from_pandas(frame("2013-01", 7), preserve_index=False).to_batches()
        connection.up = False
        raise OSError("the file cannot be read any more")

    connection.up = True
    with pytest.raises((OSError, DeltaError), match="the file cannot be read any more"):
        lake.write("raw/flights", rows)
    connection.up = True
    assert lake.version("raw/flights") == 0


def test_a_line_whose_connection_stays_lost_may_be_in_its_ledger(tmp_path, connection, monkeypatch):
    ledger, write = Ledger(Lake(tmp_path), "registry/decisions", {"task": "string"}), Ledger._write
    assert ledger.add({"task": "deploy"}, -1)

    def sent(*given):
        write(*given)
        connection.up = False
        raise OSError("connection reset after the commit was sent")

    monkeypatch.setattr(Ledger, "_write", sent)
    lines, commit = ledger.read()
    with pytest.raises(UncertainError, match="'registry/decisions': .* It may be written: .* after version 1"):
        ledger.add({"task": "celebrate"}, commit)
    connection.up = True
    assert [line["task"] for line in ledger.read()[0]] == ["deploy", "celebrate"]


def test_a_write_whose_run_cannot_be_moved_to_it_is_written(tmp_path, connection, monkeypatch):
    lake, move = Lake(tmp_path, run="ab12"), mlpkg.data.pins.move_pin

    def lost(*given):
        connection.up = False
        move(*given)

    monkeypatch.setattr(mlpkg.data.pins, "move_pin", lost)
    with pytest.raises(LakeError, match="'raw/flights': the rows are written, but"):
        lake.write("raw/flights", frame("2013-01"))
    connection.up = True
    assert lake.count("raw/flights", 0) == 5


def test_a_store_that_is_lost_before_anything_is_sent_has_got_nothing(tmp_path, connection, monkeypatch):
    "Nobody need look for it"
    lake, layout = Lake(tmp_path), Lake._layout
    lake.write("raw/flights", frame("2013-01"))

    def lost(*given):
        connection.up = False
        raise OSError("connection reset")

    monkeypatch.setattr(Lake, "_layout", lost)
    with pytest.raises(OSError, match="connection reset"):
        lake.write("raw/flights", frame("2013-01"))
    monkeypatch.setattr(Lake, "_layout", layout)
    connection.up = True
    assert lake.count("raw/flights") == 5


def without_words(place: Path, version: int) -> None:
    "Make a commit one of those that say nothing of themselves"
    entry = place / "_delta_log" / f"{version:020}.json"
    entry.write_text("\n".join(line for line in entry.read_text().splitlines() if "commitInfo" not in line))


def test_commits_of_others_that_say_nothing_of_themselves_are_commits(tmp_path):
    "Delta does not ask writers for it"
    lake = Lake(tmp_path)
    for name, several in (("raw/flights", 3), ("raw/planes", 1)):
        for _ in range(several):
            lake.write(name, frame("2013-01"))
    without_words(tmp_path / "raw/flights", 1)
    without_words(tmp_path / "raw/planes", 0)
    assert lake.versions("raw/flights")["operation"].tolist() == ["append", "unknown", "append"]
    assert lake.versions("raw/planes")["version"].tolist() == [0] and lake.lineage("raw/planes") is None
    assert find_write(lake, "raw/flights", Mark("no such mark", 0)) is None
    for name in ("raw/flights", "raw/planes"):
        assert abs(lake.written(name, {"month": "2013-01"}) - datetime.now(UTC)) < timedelta(minutes=5)
    before = datetime.now(UTC) - timedelta(days=1)
    assert needed_versions(lake, "raw/flights", before) == [0] and readable_versions(lake, "raw/flights") == [0, 1, 2]


def test_old_entries_of_a_long_log_are_not_read_by_whoever_does_not_ask_for_them(tmp_path):
    "They cannot be read here"
    lake, free = Lake(tmp_path, run="ab12"), Lake(tmp_path, run="")
    free.write("raw/planes", frame("2013-01"))
    lake.read("raw/planes")
    for version in range(60):
        free.write("clean/flights", frame("2013-01", version), partition_by=["month"])
    DeltaTable(tmp_path / "clean/flights").create_checkpoint()
    for version in range(10, 30):
        (tmp_path / "clean/flights/_delta_log" / f"{version:020}.json").write_text("commitInfo: not for you")
    free.write("clean/flights", frame("2013-01"))
    assert free.lineage("clean/flights") is None and free.written("clean/flights", {"month": "2013-01"})
    assert needed_versions(free, "clean/flights", datetime.now(UTC), protected=[3]) == [3, 60]
    written = [lake.write("clean/flights", frame(one), "replace", {"month": one}) for one in ("2013-02", "2013-03")]
    assert written == [61, 62]
    with pytest.raises(ValueError):
        free.versions("clean/flights")


def test_a_table_after_much_upkeep_is_read_and_its_log_is_looked_through_once(tmp_path):
    "As when a thousand partitions were put together, each in a commit of its own"
    lake = Lake(tmp_path)
    lake.write("raw/planes", frame("2013-01"), "overwrite")
    log = tmp_path / "raw/planes/_delta_log"
    upkeep = json.dumps({"commitInfo": {"timestamp": 7, "operation": "WRITE", "write_mode": "compact"}})
    for version in range(1, 1200):
        (log / f"{version:020}.json").write_text(upkeep)
    assert lake.count("raw/planes", 1199) == len(lake.read("raw/planes")) == 5
    assert lake.sources["raw/planes"][1] == 0
    DeltaTable(tmp_path / "raw/planes").create_checkpoint()
    for version in range(1, 1100):
        (log / f"{version:020}.json").write_text("commitInfo: not for you")
    (log / f"{1200:020}.json").write_text(upkeep)
    assert len(lake.read("raw/planes")) == 5 and lake.sources["raw/planes"][1] == 0


def test_the_tail_of_upkeep_is_looked_through_once(tmp_path):
    "Of the same version too, whether its own commit was upkeep or not"
    lake = Lake(tmp_path)
    lake.write("raw/planes", frame("2013-01"), "overwrite")
    log = tmp_path / "raw/planes/_delta_log"
    upkeep = json.dumps({"commitInfo": {"timestamp": 7, "operation": "WRITE", "write_mode": "compact"}})
    for version in range(1, 40):
        (log / f"{version:020}.json").write_text(upkeep)
    assert len(lake.read("raw/planes")) == 5
    DeltaTable(tmp_path / "raw/planes").create_checkpoint()
    for version in range(40):
        (log / f"{version:020}.json").write_text("commitInfo: not for you")
    again = Lake(tmp_path)
    assert len(again.read("raw/planes")) == 5 and again.sources["raw/planes"][1] == 0
    mlpkg.data.log._made_by.clear()
    with pytest.raises(ValueError):
        again.read("raw/planes")


def test_a_run_goes_on_with_both_tables_that_it_has_replaced(root):
    run, month = Lake(root, run="ab12"), {"month": "2013-01"}
    done = replace_together(run, {"raw/flights": frame("2013-01"), "aside/flights": frame("2013-01", rows=1)}, month)
    others = {"raw/flights": frame("2013-01").head(0), "aside/flights": frame("2013-01", rows=2)}
    replace_together(Lake(root), others, month)
    assert {name: run.version(name) for name in done} == done
    assert (run.count("raw/flights"), run.count("aside/flights")) == (5, 1)
    with pytest.raises(LakeError, match="missing column 'writer'"):
        replace_together(run, {**others, "aside/flights": others["aside/flights"][["month"]]}, month)
    assert waiting(root) == [] and {name: run.version(name) for name in done} == done


@pytest.mark.parametrize("lost", ["before its commit", "behind its commit"])
def test_a_compaction_whose_connection_stays_lost_says_what_to_do(tmp_path, connection, monkeypatch, lost):
    lake, commit = Lake(tmp_path), mlpkg.data.rewriting._commit
    for _ in range(4):
        lake.write("raw/flights", frame("2013-01"))

    def lose(*given):
        if lost == "behind its commit":
            commit(*given)
        connection.up = False
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(mlpkg.data.rewriting, "_commit", lose)
        with pytest.raises(LakeError, match="files could not be written again: connection reset. .* do it again when"):
            compact(lake, "raw/flights", more_than=1)
    connection.up = True
    assert lake.count("raw/flights") == 20
    assert compact(lake, "raw/flights", more_than=1).count == (4 if lost == "before its commit" else 0)
    assert lake.count("raw/flights") == 20 and len(DeltaTable(tmp_path / "raw/flights").file_uris()) == 1


def test_a_lake_from_the_first_write_to_lineage(root, monkeypatch):
    lake = Lake(root)
    assert lake.tables() == []
    with pytest.raises(LakeError, match="there are: none yet"):
        lake.read("raw/flights")
    monkeypatch.setenv("MLFLOW_RUN_ID", "run1")
    for month in ("2013-01", "2013-02", "2013-02"):
        lake.write("raw/flights", frame(month), "replace", {"month": month})
    lake.copy("raw/flights", "backup/flights")
    assert lake.tables() == ["backup/flights", "raw/flights"]
    assert lake.count("raw/flights") == lake.count("backup/flights") == 10
    assert len(lake.read("raw/flights", ["row"], [("month", "==", "2013-02"), ("row", ">", 2)])) == 2
    assert len(lake.read("raw/flights", version=0)) == 5
    assert lake.lineage("raw/flights", 0) == "run1"


def killed_in_the_middle(write: str, folder: Path) -> None:
    "Run a program that writes batches and kills itself between two of them"
    program = (
        "import os, signal, sys; import pandas as pd; from mlpkg.data.lake import Lake\n"
        "def batches():\n"
        "    yield pd.DataFrame({'month': '2013-01', 'writer': 0, 'write': 0, 'row': range(100_000)})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program + write, str(folder)])  # noqa: S603
    assert done.returncode == -9


def test_a_writer_that_is_killed_leaves_the_table_as_it_was(tmp_path):
    lake = Lake(tmp_path)
    lake.write("raw/flights", frame("2013-01"))
    killed_in_the_middle("Lake(sys.argv[1]).write('raw/flights', batches, 'overwrite')", tmp_path)
    assert lake.version("raw/flights") == 0 and lake.count("raw/flights") == 5
    lake.write("raw/flights", frame("2013-02"))
    assert lake.count("raw/flights") == 10


def spilled(folder):
    "Files in a folder, including deleted ones that are still open in this process"
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")]
    return [*folder.glob("*"), *(name for name in opened if name.startswith(f"{folder}/"))]


def watched(folder, found, batches=3):
    "Batches that note what they find in the folder while they are written"
    for write in range(batches):
        yield frame("2013-01", write=write)
        found.append(len(spilled(folder)))


@pytest.fixture
def spilling(tmp_path):
    "A lake opened from settings, and the folder that its streams spill to"
    folder = tmp_path / "spill"
    env = {"MLPKG_LAKE__ROOT": str(tmp_path / "lake"), "MLPKG_LAKE__SPILL": str(folder)}
    return open_lake(load_settings(env=env)), folder


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for open files in /proc")


@linux
def test_a_stream_spills_to_the_folder_in_the_settings_and_nothing_stays_there(spilling):
    lake, folder = spilling
    found = []
    lake.write("raw/flights", watched(folder, found))
    assert found == [2, 2, 2]  # one file, open to write and to read
    assert lake.count("raw/flights") == 15 and spilled(folder) == []


@linux
def test_a_stream_that_fails_leaves_nothing_in_the_folder(spilling):
    lake, folder = spilling

    def broken(found):
        yield from watched(folder, found)
        raise OSError("the source went away")

    with pytest.raises(OSError, match="the source went away"):
        lake.write("raw/flights", broken(found := []))
    assert max(found) > 0 and spilled(folder) == [] and not lake.exists("raw/flights")


@linux
def test_an_abandoned_generator_leaves_nothing_in_the_folder(tmp_path):
    batches = [pa.RecordBatch.from_pandas(frame("2013-01", write=write)) for write in range(3)]

    def repeated():
        with Spill(batches[0].schema, tmp_path) as spill:
            reopen = replayable(iter(batches), spill)
            yield from reopen()
            yield from reopen()

    for taken in (1, 4):  # abandoned in the first pass, and in the second
        reading = repeated()
        assert all(next(reading).num_rows == 5 for _ in range(taken))
        assert len(spilled(tmp_path)) in (1, 2)
        reading.close()
        assert spilled(tmp_path) == []


def test_a_killed_process_leaves_nothing_in_the_folder(tmp_path):
    killed_in_the_middle(
        "Lake(sys.argv[1] + '/lake', spill=sys.argv[1] + '/spill').write('raw/flights', batches())", tmp_path
    )
    assert list((tmp_path / "spill").iterdir()) == []


copy_large = """
import sys
import numpy as np, pyarrow as pa
from mlpkg.data.lake import Lake

lake, mode = Lake(sys.argv[1]), sys.argv[2]
rows, parts, columns = 65_536, 200, [f"x{i}" for i in range(10)]
rng = np.random.default_rng(0)

def batches():
    for part in range(parts):
        yield pa.record_batch({name: rng.integers(10_000, size=rows) / 10_000 for name in columns})


def peak():
    if sys.platform != "linux":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # bytes there
    with open("/proc/self/status") as status:  # ru_maxrss begins with that of the process that started this one
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
if mode == "spooled":
    lake.write("big/source", batches())
elif mode == "copied":
    lake.copy("big/source", "big/copy")
    assert lake.count("big/copy") == rows * parts
else:
    import pandera.pandas as schemas
    from mlpkg.data.contracts import check

    share = schemas.Column(float, schemas.Check.in_range(0, 0.9999))
    contract, seen = schemas.DataFrameSchema(dict.fromkeys(columns, share)), 0
    for batch in lake.batches("big/source"):
        outcome = check(batch.to_pandas(), contract)
        assert outcome.bad_rows == 0
        seen += outcome.rows
    assert seen == rows * parts
after = peak()
print((after - before) / 1024, rows * parts * len(columns) * 8 / 2**20)
"""


def test_memory_stays_flat_when_a_large_table_is_written_copied_and_validated(tmp_path):
    bound = 350  # MiB; memory does not grow with the table
    for mode in ("spooled", "copied", "validated"):
        command = [sys.executable, "-X", "faulthandler", "-c", copy_large, str(tmp_path), mode]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        assert done.returncode == 0, done.stderr
        grown, size = map(float, done.stdout.split())
        print(f"{mode}: {grown:.0f} MiB of memory for a table of {size:.0f} MiB")
        assert grown < bound < size / 2.8


def test_a_replacement_without_rows_for_a_listed_part_is_refused_unless_said(root):
    lake, months = Lake(root), ["2013-01", "2013-02", "2013-03"]
    lake.write("raw/flights", pd.concat(map(frame, months)), "replace", {"month": months})
    for data in (frame("2013-02"), iter([frame("2013-02")]), lambda: iter([frame("2013-02")])):
        with pytest.raises(LakeError, match="no rows for month=2013-01, month=2013-03: .*pass allow_empty=True"):
            lake.write("raw/flights", data, "replace", {"month": months})
    with pytest.raises(LakeError, match="no rows for month=2013-02"):
        lake.write("raw/flights", frame("2013-02").head(0), "replace", {"month": "2013-02"})
    with pytest.raises(LakeError, match="no rows for month=2013-01 writer=2, month=2013-02 writer=1: "):
        rows = pd.concat([frame("2013-01", 1), frame("2013-02", 2)])
        lake.write("raw/flights", rows, "replace", {"month": months[:2], "writer": [1, 2]})
    assert (lake.version("raw/flights"), lake.count("raw/flights")) == (0, 15)
    lake.write("raw/flights", frame("2013-02"), "replace", {"month": months}, allow_empty=True)
    assert lake.count("raw/flights") == 5


def ask(root, barrier, found):
    "One of several steps of a DAG run that ask for a table at the same moment"
    lake = Lake(root)
    barrier.wait()
    version = lake.version("raw/flights")
    found.put((version, lake.count("raw/flights"), len(lake.read("raw/flights"))))


def test_steps_of_a_run_that_ask_at_the_same_moment_get_the_same_version(root, monkeypatch):
    others = Lake(root)
    others.write("raw/flights", frame("2013-01"))
    monkeypatch.setenv("MLPKG_PIPELINE_RUN", "0a1b2c3d")
    barrier, found = spawn.Barrier(writers + 1), spawn.Queue()
    jobs = [spawn.Process(target=ask, args=(root, barrier, found)) for _ in range(writers)]
    for job in jobs:
        job.start()
    barrier.wait()
    while any(job.is_alive() for job in jobs) and others.version("raw/flights") < 400:
        others.write("raw/flights", frame("2013-02"))
    for job in jobs:
        job.join(60)
    answers = {found.get(timeout=10) for _ in jobs}
    assert len(answers) == 1, "one version for all of them"
    ((version, count, rows),) = answers
    assert (count, rows) == (5 * (version + 1), count)
    assert others.tables() == ["raw/flights"], "what runs pin is no table of the lake"


def test_a_run_sees_what_its_steps_write_and_nothing_that_others_write_meanwhile(root):
    others, first, second = Lake(root), Lake(root, run="aa"), Lake(root, run="aa")
    others.write("raw/flights", frame("2013-01"))
    assert first.version("raw/flights") == 0
    others.write("raw/flights", frame("2013-02"))
    assert (second.count("raw/flights"), len(second.read("raw/flights")), others.count("raw/flights")) == (5, 5, 10)
    assert Lake(root, run="bb").count("raw/flights") == 10
    second.write("clean/flights", frame("2013-01"))
    others.write("clean/flights", frame("2013-02"))
    assert (first.count("clean/flights"), others.count("clean/flights")) == (5, 10)
    assert second.write("raw/flights", frame("2013-03")) == 2
    assert (first.version("raw/flights"), first.count("raw/flights")) == (2, 15)
    assert first.count("raw/flights", version=1) == 10, "a version that is named is that version"


def test_the_time_of_a_partition_is_that_of_its_own_rows(root):
    lake = Lake(root)
    for month in ("2013-01", "2013-02"):
        lake.write("raw/flights", frame(month), "replace", {"month": month})
    january, february = (lake.written("raw/flights", {"month": month}) for month in ("2013-01", "2013-02"))
    assert january < february
    lake._open("raw/flights").optimize.compact()
    assert lake.written("raw/flights", {"month": "2013-01"}) == january
    lake.write("raw/flights", frame("2013-01"), "replace", {"month": ["2013-01"]})
    assert lake.written("raw/flights", {"month": "2013-01"}) > february


@pytest.mark.parametrize("version", [7, 10**12, 2**64])
def test_a_version_that_no_table_has_reached_is_refused_at_once(tmp_path, version):
    lake = Lake(tmp_path)
    lake.write("raw/orders", pd.DataFrame({"rows": [1]}))
    with pytest.raises(LakeError, match=rf"has no version {version} \(there are: 0 to 0\)"):
        lake.read("raw/orders", version=version)
