"""What a page cannot show of retention: stores of their own, processes that are killed or work at the same time.

The S3 tests run where AWS_ENDPOINT_URL (and credentials) point to a server; they make a bucket of their own.
"""

import configparser
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from mlpkg.data import log, retention, rewriting, together, upkeep
from mlpkg.data.arrow import LakeError
from mlpkg.data.lake import Lake
from mlpkg.data.log import UncertainError, table_folder
from mlpkg.data.retention import (
    forget_history,
    needed_versions,
    readable_versions,
    remove_tables,
    remove_versions,
    stored_files,
    trim_log,
)
from mlpkg.data.rewriting import delete_rows
from mlpkg.data.together import Waiting, put_down, replace_together
from mlpkg.data.upkeep import compact, tidy_lake
from mlpkg.serving import forgetting
from mlpkg.serving.answer_log import AnswerLog, answers_folder
from mlpkg.serving.answers import Answer, new_request_id, to_line
from mlpkg.serving.feedback import Feedback, Truth
from mlpkg.serving.forgetting import ForgetError, forget
from mlpkg.serving.segments import Owner
from mlpkg.testing import age_table

spawn = multiprocessing.get_context("spawn")  # deltalake's runtime does not survive fork
NAME = "raw/orders"
now = datetime.now(UTC)


def frame(value: int, months=("01", "02")) -> pd.DataFrame:
    return pd.DataFrame({"month": list(months), "value": value})


def write_randomly(lake: Lake, rng: random.Random, times: int, days: float) -> None:
    "Writes of all kinds, each some days after the one before"
    for value in range(times):
        mode = rng.choice(["append", "overwrite", "replace"]) if value else "append"
        partition, months = ({"month": "01"}, ["01"]) if mode == "replace" else (None, ["01", "02"])
        lake.write(NAME, frame(value, months), mode, partition, ["month"] if not value else None)
        age_table(lake, NAME, days)


def contents(lake: Lake) -> dict[int, list]:
    "The rows of each version that can be read"
    return {
        v: sorted(lake.read(NAME, version=v).itertuples(index=False, name=None)) for v in readable_versions(lake, NAME)
    }


def test_a_checkpoint_does_not_delete_the_log_of_old_versions(tmp_path):
    lake = Lake(tmp_path)
    often = {"delta.checkpointInterval": "2"}
    write_deltalake(f"{lake.root}/{NAME}", frame(0), configuration=often)
    for file in (tmp_path / NAME / "_delta_log").iterdir():
        os.utime(file, (0, 0))
    for value in range(1, 6):
        lake.write(NAME, frame(value))
    compact(lake, NAME, more_than=2)
    assert list(tmp_path.rglob("*.checkpoint.parquet"))
    assert lake.read(NAME, version=0)["value"].tolist() == [0, 0]
    assert lake.versions(NAME)["version"].min() == 0


@pytest.mark.parametrize("seed", range(3))
def test_every_needed_version_reads_as_before_and_the_others_say_that_they_are_gone(root, seed):
    lake, rng = Lake(root), random.Random(seed)
    write_randomly(lake, rng, 8, days=3)
    before, protected = now - timedelta(days=10), rng.sample(range(8), 2)
    was, keep = contents(lake), needed_versions(lake, NAME, before, protected)
    assert sorted(was) == list(range(8))
    would = remove_versions(lake, NAME, before, protected, dry_run=True)
    assert contents(lake) == was
    assert remove_versions(lake, NAME, before, protected) == would
    found = contents(lake)
    for version, rows in was.items():
        if version in keep or version > keep[-1]:
            assert found[version] == rows, "a version that is needed"
    for version in set(was) - set(found):
        with pytest.raises(LakeError, match=f"version {version} can no longer be read"):
            lake.read(NAME, version=version)
    assert not remove_versions(lake, NAME, before, protected).files
    assert list(tidy_lake(lake, before, {NAME: protected})) and contents(lake).items() >= found.items()


def test_a_file_given_up_yesterday_stays_although_it_was_written_long_ago(tmp_path):
    "Also where a checkpoint has left out when it was given up"
    lake = Lake(tmp_path)
    lake.write(NAME, frame(0))
    age_table(lake, NAME, 400)
    lake.write(NAME, frame(1), "overwrite")
    table = DeltaTable(f"{lake.root}/{NAME}")
    table.alter.set_table_properties({"delta.deletedFileRetentionDuration": "interval 1 hours"})
    age_table(lake, NAME, 2)
    for file in tmp_path.rglob("*.parquet"):
        os.utime(file, (0, 0))
    trim_log(lake, NAME, 0)
    lake._open(NAME).create_checkpoint()
    remove_versions(lake, NAME, now - timedelta(days=30))
    assert lake.read(NAME, version=0)["value"].tolist() == [0, 0]


def test_a_version_that_was_replaced_since_stays_to_the_minute(tmp_path):
    lake, ages = Lake(tmp_path), [120, 80, 70]  # Minutes ago
    for value, (age, later) in enumerate(zip(ages, [*ages[1:], 0], strict=True)):
        lake.write(NAME, frame(value), "overwrite")
        age_table(lake, NAME, (age - later) / 1440)
    for file in tmp_path.rglob("*.parquet"):
        os.utime(file, (0, 0))
    remove_versions(lake, NAME, datetime.now(UTC) - timedelta(minutes=90))
    assert readable_versions(lake, NAME) == [0, 1, 2], "the first was current then, the second came later"


def test_the_log_of_a_protected_version_stays_when_that_of_older_ones_goes(tmp_path):
    lake = Lake(tmp_path)
    for value in range(106):
        lake.write(NAME, frame(value, ["01"]), "overwrite")
    age_table(lake, NAME, 10)
    done = remove_versions(lake, NAME, now - timedelta(days=1), protected=[102])
    assert done.note == "kept: 102" and done.count > 102
    assert lake.read(NAME, version=102)["value"].tolist() == [102]
    assert lake.versions(NAME)["version"].min() == 102


def test_a_file_that_a_writer_has_not_committed_yet_stays(tmp_path):
    lake = Lake(tmp_path)
    for value in range(3):
        lake.write(NAME, frame(value), "overwrite")
    fresh = tmp_path / NAME / "part-of-a-writer.parquet"
    fresh.write_bytes(b"not committed yet")
    remove_versions(lake, NAME, datetime.now(UTC))
    assert forget_history(lake, NAME).failed
    assert fresh.exists() and readable_versions(lake, NAME) == [lake.version(NAME)]


def test_killed_while_it_deletes_the_log_it_leaves_a_table_that_can_be_read(root, monkeypatch):
    lake = Lake(root)
    for value in range(12):
        lake.write(NAME, frame(value))
    monkeypatch.setattr(retention, "_grace", -timedelta(days=1))  # nothing is young
    program = (
        "import datetime, os, signal, sys; from mlpkg.data.lake import Lake; from mlpkg.data import log, retention\n"
        "retention._grace = -datetime.timedelta(days=1)\n"
        "def stop(lake, name, paths):\n"
        "    for path in paths[:4]: log.table_folder(lake, name).delete_file(path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "retention._delete_files = stop\n"
        f"retention.trim_log(Lake(sys.argv[1]), {NAME!r}, 9, limit=0)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, root]).returncode == -9  # noqa: S603
    assert [len(lake.read(NAME, version=version)) for version in (9, 10, 11)] == [20, 22, 24]
    with pytest.raises(LakeError, match="can no longer be read"):
        lake.read(NAME, version=2)
    trim_log(lake, NAME, 9, limit=0)
    assert lake.versions(NAME)["version"].min() == 9 and lake.count(NAME) == 24
    lake.write(NAME, frame(12))
    assert lake.count(NAME) == 26


def test_killed_while_it_empties_young_entries_it_leaves_versions_that_are_whole_or_gone(root):
    lake = Lake(root)
    for value in range(12):
        lake.write(NAME, frame(value))
    program = (
        "import os, signal, sys; from mlpkg.data.lake import Lake; from mlpkg.data import retention\n"
        "empty = retention.empty_entry\n"
        "def stop(*given): os.kill(os.getpid(), signal.SIGKILL) if given[-1] < 5 else empty(*given)\n"
        "retention.empty_entry = stop\n"
        f"retention.trim_log(Lake(sys.argv[1]), {NAME!r}, 9, limit=0)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, root]).returncode == -9  # noqa: S603
    assert [len(lake.read(NAME, version=version)) for version in (0, 4, 9, 11)] == [2, 10, 20, 24]
    for version in (5, 8):
        with pytest.raises(LakeError, match=f"version {version} can no longer be read"):
            lake.read(NAME, version=version)
    assert readable_versions(lake, NAME) == lake.versions(NAME)["version"].tolist()[::-1] == [9, 10, 11]
    trim_log(lake, NAME, 9, limit=0)
    assert readable_versions(lake, NAME) == [9, 10, 11] and lake.count(NAME) == 24 and entries(lake) == 12


def test_killed_while_it_removes_a_table_it_leaves_one_that_goes_next_time(root):
    runs = Lake(f"{root}/_runs")
    for run in ("a1", "b2"):
        for value in range(6):
            runs.write(run, frame(value))
        age_table(runs, run, 100)
    program = (
        "import os, signal, sys, datetime as d; from mlpkg.data.lake import Lake\n"
        "from mlpkg.data import log, retention\n"
        "def stop(lake, name, paths):\n"
        "    for path in paths[:-2]: log.table_folder(lake, name).delete_file(path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "retention._delete_files = stop\n"
        "retention.remove_tables(Lake(sys.argv[1]), d.datetime.now(d.UTC) - d.timedelta(days=10))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, runs.root]).returncode == -9  # noqa: S603
    done = remove_tables(runs, now - timedelta(days=10))
    assert (done.count, done.note, runs.tables()) == (2, "", [])


def test_a_table_that_cannot_be_removed_does_not_keep_the_others(tmp_path, monkeypatch):
    runs, delete = Lake(tmp_path), retention._delete_files
    for run in ("a1", "b2"):
        runs.write(run, frame(0))

    def refused(lake, name, paths):
        if name == "a1":
            raise PermissionError("the store refuses")
        delete(lake, name, paths)

    monkeypatch.setattr(retention, "_delete_files", refused)
    done = remove_tables(runs, now + timedelta(days=1))
    assert (done.failed, done.count, runs.tables()) == (True, 1, ["a1"])
    assert done.note == "a1 not removed: the store refuses"


def compact_at_once(place, barrier):
    lake = Lake(place)
    barrier.wait()
    for _ in range(3):
        compact(lake, NAME, more_than=1)


def overwrite_at_once(place, barrier):
    lake = Lake(place)
    barrier.wait()
    for value in range(3):
        lake.write(NAME, frame(100 + value), "overwrite")


def delete_at_once(place, barrier):
    lake = Lake(place)
    barrier.wait()
    for value in range(3):
        delete_rows(lake, NAME, [("value", "==", value)])


def test_a_checkpoint_that_is_not_listed_yet_is_waited_for(tmp_path, monkeypatch):
    "The log of a table has a hint to its checkpoint, which is replaced and removed while others read"
    lake, pauses = Lake(tmp_path), list[float]()
    for value in range(6):
        lake.write(NAME, frame(value))
    trim_log(lake, NAME, 4, limit=0)
    [checkpoint] = (tmp_path / NAME / "_delta_log").glob("*.checkpoint.parquet")
    aside = tmp_path / "aside"

    def come_back(seconds):
        pauses.append(seconds)
        if len(pauses) % 3 == 0:
            aside.rename(checkpoint)

    monkeypatch.setattr(log.time, "sleep", come_back)
    for look in (
        lambda: lake.version(NAME),
        lambda: lake._open(NAME, 5).version(),
        lambda: lake.write(NAME, frame(6)) - 1,
    ):
        checkpoint.rename(aside)
        assert look() == 5
    assert pauses == sorted(pauses[:3]) * 3 and len(set(pauses)) == 3


@pytest.mark.parametrize(("seconds", "looks"), [(0.5, 5), (3, 1)])
def test_a_look_that_took_long_is_not_repeated(tmp_path, monkeypatch, seconds, looks):
    "deltalake itself has tried a store that cannot be reached again and again"
    clock, seen = [0.0], []
    monkeypatch.setattr(log.time, "sleep", seen.append)
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])

    def look():
        clock[0] += seconds
        return DeltaTable(tmp_path / "raw")

    Lake(tmp_path).write("raw", frame(0))
    (tmp_path / "raw/_delta_log" / f"{0:020}.json").write_text("{}")
    with pytest.raises(DeltaError, match="No table metadata"):
        log.look_again(look)
    assert len(seen) == looks - 1 and sum(seen) < 1


def trim_often(place):
    lake = Lake(place)
    for value in range(20):
        lake.write(NAME, frame(value))
        trim_log(lake, NAME, lake.version(NAME), limit=0)
        time.sleep(0.2)


def test_who_looks_at_a_table_while_its_log_is_trimmed_sees_it(root):
    lake = Lake(root)
    lake.write(NAME, frame(0))
    job = spawn.Process(target=trim_often, args=(root,))
    job.start()
    try:
        while job.is_alive():
            assert lake.exists(NAME) and lake.version(NAME) >= 0
    finally:
        job.join()
    assert job.exitcode == 0 and lake.version(NAME) == 20


@pytest.fixture
def trimmed(monkeypatch):
    "Let somebody else write, and trim the log, right after the commits of a lake, which may then get an error"

    def behind(lake: Lake, error: Exception | None, days: int = 1) -> None:
        commit = Lake._commit

        def wrapped(self, name, *given):
            commit(self, name, *given)
            if self is lake:
                other = Lake(lake.root)
                other.write(name, frame(100))
                age_table(other, name, days)
                trim_log(other, name, other.version(name), limit=0)
                if error:
                    raise error

        monkeypatch.setattr(Lake, "_commit", wrapped)

    return behind


@pytest.mark.parametrize("error", [CommitFailedError("refused"), DeltaError("no answer"), OSError("no answer")])
def test_a_write_of_which_the_log_does_not_tell_any_more_is_neither_repeated_nor_said_to_have_failed(
    tmp_path, trimmed, error
):
    lake = Lake(tmp_path)
    lake.write(NAME, frame(0))
    trimmed(lake, error)
    with pytest.raises(UncertainError, match="nobody can tell .* look for its rows in the table"):
        lake.write(NAME, frame(1))
    assert sorted(lake.read(NAME)["value"]) == [0, 0, 1, 1, 100, 100]


@pytest.mark.parametrize(("error", "days"), [(None, 1), (None, 0), (OSError("no answer"), 0)])
def test_a_write_that_is_there_has_a_version_although_its_log_is_trimmed(tmp_path, trimmed, error, days):
    "The marks of young commits stay"
    lake = Lake(tmp_path, run="ab12")
    lake.write(NAME, frame(0))
    trimmed(lake, error, days)
    version = lake.write(NAME, frame(1))
    assert version == 2 and sorted(lake.read(NAME, version=version)["value"]) == [0, 0, 1, 1, 100, 100]


def test_a_commit_keeps_its_number_while_others_write_all_the_time(root, monkeypatch):
    "deltalake 1.6.6 counts those of others too, which came after the table was opened"
    lake, other, find = Lake(root), Lake(root), Lake._find

    def busy(self, name, version=None):
        table = find(self, name, version)
        if self is lake and table is not None:
            other.write(NAME, frame(100))
        return table

    other.write(NAME, frame(0))
    with monkeypatch.context() as patch:
        patch.setattr(Lake, "_find", busy)
        version = lake.write(NAME, frame(1))
        told = lake.versions(NAME)
    values = [other.read(NAME, version=number)["value"] for number in (version - 1, version)]
    assert [1 in set(found) for found in values] == [False, True]
    assert told["version"].tolist()[-1] == 0


PART = {"month": "01"}


def put_together(lake: Lake, value: int) -> dict[str, int]:
    "Replace rows of two tables by others"
    return replace_together(lake, {NAME: frame(value, ["01"]), "aside/orders": frame(value, ["01"])}, PART)


def stop_before_commit(place) -> subprocess.Popen:
    "A writer that is stopped when it has seen which number is free, and has not yet put its commit there"
    program = (
        "import sys; from mlpkg.data.lake import Lake; from tests.test_retention import NAME, frame\n"
        "lake = Lake(sys.argv[1]); lake.sources['long' * 10**7] = ['', 0]  # it takes a while to write that\n"
        "print(lake.write(NAME, frame(42)))"
    )
    log, there = Path(place, NAME, "_delta_log"), Lake(place).version(NAME)
    command, home = [sys.executable, "-c", program, str(place)], Path(__file__).parents[1]
    writer = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True)  # noqa: S603
    while writer.poll() is None and not (draft := next(log.glob(f"{there + 1:020}.json#*"), None)):
        pass
    writer.send_signal(signal.SIGSTOP)
    assert draft and Lake(place).version(NAME) == there, "it was too fast"
    return writer


def test_a_writer_who_was_stopped_before_its_commit_loses_no_rows_where_history_is_forgotten_meanwhile(tmp_path):
    lake = Lake(tmp_path)
    for value in range(3):
        lake.write(NAME, frame(value))
    writer = stop_before_commit(tmp_path)
    try:
        for value in range(3, 6):
            lake.write(NAME, frame(value))
        forget_history(lake, NAME)
        newest = lake.version(NAME)
        assert lake.versions(NAME)["version"].tolist() == readable_versions(lake, NAME) == [newest]
        with pytest.raises(LakeError, match="version 4 can no longer be read"):
            lake.read(NAME, version=4)
        writer.send_signal(signal.SIGCONT)
        assert writer.communicate(timeout=120)[0] == f"{newest + 1}\n"
    finally:
        writer.kill()
    assert sorted(lake.read(NAME)["value"]) == sorted([*range(6), 42] * 2)


@pytest.mark.parametrize("behind", [[5], [2], [1, 2, 3, 4, 5]])
def test_numbers_stay_taken_whatever_the_clocks_of_writers_say(tmp_path, behind):
    "Those of some machines are more than an hour behind, or this one is ahead"
    lake = Lake(tmp_path)
    for value in range(6):
        lake.write(NAME, frame(value))
    for version in behind:
        entry = tmp_path / NAME / "_delta_log" / f"{version:020}.json"
        entry.write_text(re.sub(r'"timestamp":\d+', '"timestamp":7', entry.read_text()))
    forget_history(lake, NAME)
    assert entries(lake) == lake.version(NAME) + 1 and readable_versions(lake, NAME) == [lake.version(NAME)]


def test_numbers_stay_taken_where_the_clock_of_this_machine_is_ahead(tmp_path, monkeypatch):
    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=2)

    lake = Lake(tmp_path)
    for value in range(6):
        lake.write(NAME, frame(value))
    monkeypatch.setattr(retention, "datetime", Ahead)
    trim_log(lake, NAME, 5, limit=0)
    assert entries(lake) == 6 and readable_versions(lake, NAME) == [5]


def age_files(lake: Lake, hours: dict[str, float]) -> None:
    "Let files of a log be so many hours old"
    for name, age in hours.items():
        then = (now - timedelta(hours=age)).timestamp()
        os.utime(Path(lake.root, NAME, "_delta_log", name), (then, then))


def test_a_checkpoint_that_was_there_before_does_not_tell_the_time(tmp_path):
    "It is not written again, and may be days old"
    lake = Lake(tmp_path)
    for value in range(5):
        lake.write(NAME, frame(value))
    DeltaTable(tmp_path / NAME, version=3).create_checkpoint()
    age_files(lake, {f"{version:020}.json": 48.5 for version in range(3)})
    age_files(lake, {f"{3:020}.json": 48, f"{3:020}.checkpoint.parquet": 48})
    trim_log(lake, NAME, 3, limit=0)
    assert entries(lake) == 2 and readable_versions(lake, NAME) == [3, 4]


def test_whoever_reads_before_and_behind_a_trimmed_log_has_read_the_same(tmp_path):
    "Only upkeep is between the rows and the oldest version that stays"
    lake = Lake(tmp_path)
    lake.write(NAME, frame(0))
    lake.write(NAME, frame(1), "overwrite")
    for _ in range(4):
        DeltaTable(tmp_path / NAME).alter.set_table_properties({"delta.appendOnly": "false"})
    lake.read(NAME)
    assert lake.sources[NAME][1] == 1
    age_files(lake, {f"{version:020}.json": 48 for version in range(6)})
    trim_log(lake, NAME, 4, limit=0)
    log._made_by.clear()  # as in another process
    other = Lake(tmp_path)
    other.read(NAME)
    assert other.sources == lake.sources and readable_versions(lake, NAME) == [4, 5]
    assert entries(lake) == 5, "of the first commit, nothing is left"


def test_numbers_stay_taken_where_the_newest_entry_cannot_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "_grace", -timedelta(days=1))  # nothing is young
    lake = Lake(tmp_path)
    for value in range(4):
        lake.write(NAME, frame(value))
    DeltaTable(tmp_path / NAME).create_checkpoint()
    (tmp_path / NAME / "_delta_log" / f"{3:020}.json").unlink()
    trim_log(lake, NAME, 3, limit=0)
    assert entries(lake) == 3 and lake.count(NAME) == 8


@pytest.mark.parametrize("mode", ["append", "overwrite", "replace"])
def test_a_writer_whose_table_is_trimmed_while_rows_are_drawn_writes_them_once(root, mode):
    "It has opened the table before"
    lake, other, looks = Lake(root), Lake(root), []
    for value in range(3):
        lake.write(NAME, frame(value))

    def rows():
        yield pa.RecordBatch.from_pandas(frame(42, ["01"]))
        if looks.append(1) or len(looks) == 1:
            for value in range(3, 6):
                other.write(NAME, frame(value))
            forget_history(other, NAME)

    version = lake.write(NAME, rows, mode, PART if mode == "replace" else None, allow_empty=True)
    expected = {"append": [*range(6)] * 2 + [42], "overwrite": [42], "replace": [*range(6), 42]}
    assert version == lake.version(NAME) and sorted(lake.read(NAME)["value"]) == sorted(expected[mode])


def entries(lake: Lake) -> int:
    "How many numbers of commits are taken in the log of a table"
    return sum(path.endswith(".json") for path in stored_files(lake, NAME, "_delta_log"))


def test_numbers_that_nobody_can_take_any_more_go_from_the_log(tmp_path):
    "Those of commits that were replaced longer ago than a writer may be stopped; S3 does not let us set their times"
    lake = Lake(tmp_path)
    for value in range(4):
        lake.write(NAME, pd.DataFrame({"customer": [f"customer{value}"]}), "overwrite")
    forget_history(lake, NAME)
    newest = lake.version(NAME)
    assert entries(lake) == newest + 1 and readable_versions(lake, NAME) == [newest]
    assert holders(lake, Path("nowhere"), "customer0", "customer1", "customer2") == []
    age_table(lake, NAME, days=1)
    lake.write(NAME, pd.DataFrame({"customer": ["customer4"]}), "overwrite")
    assert needed_versions(lake, NAME, now - timedelta(days=9)) == [newest]
    forget_history(lake, NAME)
    assert entries(lake) == 1 + lake.version(NAME) - newest and readable_versions(lake, NAME) == [lake.version(NAME)]


def test_rows_wait_no_longer_when_the_log_goes_that_says_that_they_count(root, monkeypatch):
    "Their writer was killed before he brought them in"
    lake = Lake(root)
    put_together(lake, 0)
    with monkeypatch.context() as patch:
        patch.setattr(together, "settled", lambda lake, name: lake._find(name))
        with pytest.raises(LakeError, match="not in the table's log"):
            put_together(lake, 1)
    lake.write(NAME, frame(2, ["02"]))
    forget_history(lake, NAME)
    assert lake.read("aside/orders")["value"].tolist() == [1]


def test_rows_that_others_have_brought_in_and_replaced_are_not_brought_in_again(root, monkeypatch):
    "The reader who is slow finds neither the rows nor their mark, because the log was trimmed meanwhile"
    lake, attempt = Lake(root), together._attempt
    put_together(lake, 0)

    def late(*given):
        monkeypatch.setattr(together, "_attempt", attempt)
        put_together(Lake(root), 2)
        trim_log(lake, "aside/orders", lake.version("aside/orders"), limit=0)
        attempt(*given)

    monkeypatch.setattr(together, "_attempt", late)
    put_together(lake, 1)
    assert lake.read(NAME)["value"].tolist() == lake.read("aside/orders")["value"].tolist() == [2]


def tidy_often(place, barrier, protected):
    lake = Lake(place)
    barrier.wait()
    for _ in range(4):
        assert not [one for one in tidy_lake(lake, now - timedelta(days=10), {NAME: protected}) if one.failed]


def write_often(place, barrier):
    lake = Lake(place)
    barrier.wait()
    for value in range(8):
        lake.write(NAME, frame(100 + value))


def test_two_at_once_and_a_writer_do_each_other_no_harm(root):
    lake = Lake(root)
    write_randomly(lake, random.Random(7), 8, days=3)
    keep, was = needed_versions(lake, NAME, now - timedelta(days=10), [1]), contents(lake)
    barrier = spawn.Barrier(3)
    jobs = [spawn.Process(target=tidy_often, args=(root, barrier, [1])) for _ in range(2)]
    jobs.append(spawn.Process(target=write_often, args=(root, barrier)))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(180)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    found = contents(lake)
    assert all(found[version] == was[version] for version in keep)
    rows = lake.read(NAME)["value"]
    assert sorted(rows[rows >= 100]) == sorted(list(range(100, 108)) * 2)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([compact_at_once], [*range(8)]),
        ([compact_at_once, compact_at_once], [*range(8)]),
        ([compact_at_once, overwrite_at_once], [102]),
        ([compact_at_once, delete_at_once], [*range(3, 8)]),
        ([delete_at_once, overwrite_at_once], [102]),
    ],
)
def test_whoever_writes_rows_again_neither_doubles_them_nor_brings_replaced_ones_back(root, others, expected):
    "deltalake's own compaction does both, in 1.6.6"
    lake, work = Lake(root), [compact_at_once, *others]
    barrier = spawn.Barrier(len(work))
    for value in range(8):
        lake.write(NAME, frame(value), partition_by=["month"])
    jobs = [spawn.Process(target=one, args=(root, barrier)) for one in work]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(180)
    assert [job.exitcode for job in jobs] == [0] * len(jobs)
    assert sorted(lake.read(NAME)["value"]) == sorted(expected * 2)


def disk(lake: Lake, name: str = NAME) -> dict[str, int]:
    "The files of a table without its log"
    return {path: size for path, size in stored_files(lake, name).items() if not path.startswith("_delta_log")}


def live(lake: Lake, name: str = NAME) -> dict[str, int]:
    "The files that its newest version consists of"
    files = pa.table(lake._open(name).get_add_actions()).to_pylist()
    return {unquote(file["path"]): file["size_bytes"] for file in files}


def test_storage_grows_with_the_traffic_and_not_with_its_square(tmp_path):
    lake, rng, cycles = Lake(tmp_path), np.random.default_rng(0), 24
    for _ in range(cycles):
        for _ in range(11):
            lake.write(NAME, pd.DataFrame({"month": "01 ä", "value": rng.random(2000)}), partition_by=["month"])
        compact(lake, NAME)
    rows = lake.read(NAME)["value"]
    assert len(rows) == rows.nunique() == cycles * 11 * 2000 and len(live(lake)) < 20
    assert sum(disk(lake).values()) < 6 * sum(live(lake).values())
    assert [lake.count(NAME, version) for version in (0, 10, 11, 12)] == [2000, 22_000, 22_000, 24_000]


def test_files_of_a_good_size_are_left_alone(tmp_path, monkeypatch):
    lake, rng = Lake(tmp_path), np.random.default_rng(0)
    for module in (upkeep, rewriting):
        monkeypatch.setattr(module, "file_size", 2**17)
    lake.write(NAME, pd.DataFrame({"value": rng.random(10_000)}))
    large = set(live(lake))
    for _ in range(11):
        lake.write(NAME, pd.DataFrame({"value": rng.random(2000)}))
    assert compact(lake, NAME).count == 11 and large < set(live(lake)) and len(live(lake)) == 3
    assert lake.read(NAME)["value"].nunique() == 32_000 and not compact(lake, NAME)


def test_rows_without_a_value_of_their_partition_are_put_together_too(tmp_path):
    lake, nowhere = Lake(tmp_path), pd.Series([None], dtype="str")
    for value in range(12):
        lake.write(NAME, pd.DataFrame({"month": nowhere, "value": value}), partition_by=["month"])
    assert compact(lake, NAME).count == 12 and len(live(lake)) == 1
    rows = lake.read(NAME)
    assert sorted(rows["value"]) == [*range(12)] and rows["month"].isna().all()


@pytest.fixture
def meanwhile(monkeypatch):
    "Let somebody do something whenever rows are about to be written again"
    stream, seen = rewriting._stream, []

    def during(job) -> list:
        monkeypatch.setattr(rewriting, "_stream", lambda *given: (seen.append(job()), stream(*given))[1])
        return seen

    return during


@pytest.mark.parametrize("month", ["01", "02"])
def test_who_appends_meanwhile_does_not_keep_small_files_from_being_put_together(root, meanwhile, month):
    lake = Lake(root)
    for value in range(12):
        lake.write(NAME, frame(value, ["01"]), partition_by=["month"])
    seen = meanwhile(lambda: Lake(root).write(NAME, frame(100, [month])))
    done = compact(lake, NAME)
    assert (done.count, done.note, done.failed, len(seen)) == (12, "put together", False, 1)
    assert len(live(lake)) == 2 and len(disk(lake)) == 14 and not compact(lake, NAME)
    assert sorted(lake.read(NAME)["value"]) == [*range(12), 100]


def test_who_replaces_the_rows_meanwhile_goes_first_and_nothing_is_left_of_the_attempt(root, meanwhile):
    lake = Lake(root)
    rows = [pd.DataFrame({"month": ["01"], "value": value}) for value in range(12)]
    for one in rows:
        lake.write(NAME, one, partition_by=["month"])
    known = disk(lake)

    def again():
        for mode, one in zip(["replace"] + ["append"] * 11, rows, strict=True):
            lake.write(NAME, one, mode, {"month": "01"} if mode == "replace" else None)
        known.update(live(lake))

    seen = meanwhile(again)
    done = compact(lake, NAME)
    assert done.failed and done.count == 0 and len(seen) == 3 and disk(lake) == known
    assert "month=01" in done.note and "Run `mlpkg tidy` again" in done.note
    assert sorted(lake.read(NAME)["value"]) == [*range(12)]


def test_who_has_put_the_files_together_meanwhile_has_done_it(tmp_path, meanwhile):
    lake, first = Lake(tmp_path), [True]
    for value in range(12):
        lake.write(NAME, frame(value), partition_by=["month"])

    def other():
        if first:
            first.clear()
            compact(Lake(tmp_path), NAME)

    meanwhile(other)
    done = compact(lake, NAME)
    assert (done.count, done.failed) == (0, False) and len(disk(lake)) == 26
    assert sorted(lake.read(NAME)["value"]) == sorted([*range(12)] * 2)


def test_files_of_an_attempt_that_failed_go_at_once(tmp_path, monkeypatch):
    lake = Lake(tmp_path)
    for value in range(12):
        lake.write(NAME, frame(value), partition_by=["month"])
    known, commit = disk(lake), rewriting._commit

    def lost(*given, before: bool):
        if not before:
            commit(*given)
        raise OSError("the connection was lost")

    monkeypatch.setattr(rewriting, "_commit", partial(lost, before=True))
    with pytest.raises(LakeError, match="could not be written again: the connection was lost. .* do it again"):
        compact(lake, NAME)
    assert disk(lake) == known
    monkeypatch.setattr(rewriting, "_commit", partial(lost, before=False))
    assert compact(lake, NAME).count == 24, "the commit was there although nobody heard of it"
    assert len(live(lake)) == 2 and sorted(lake.read(NAME)["value"]) == sorted([*range(12)] * 2)


@pytest.mark.parametrize("lost", [False, True])
def test_files_whose_commit_is_not_in_the_log_any_more_are_not_removed(tmp_path, monkeypatch, lost):
    "Somebody else writes, and trims the log, before anybody has looked whether the commit is there"
    lake, commit = Lake(tmp_path), rewriting._commit
    for value in range(12):
        lake.write(NAME, frame(value), partition_by=["month"])

    def trimmed(*given):
        commit(*given)
        lake.write(NAME, frame(100))
        age_table(lake, NAME, days=1)
        trim_log(lake, NAME, lake.version(NAME), limit=0)
        if lost:
            raise OSError("the connection was lost")

    monkeypatch.setattr(rewriting, "_commit", trimmed)
    done = compact(lake, NAME)
    assert done.count == (0 if lost else 24) and len(live(lake)) == 6
    assert sorted(lake.read(NAME)["value"]) == sorted([*range(12), 100, 100] * 2)


def test_what_a_killed_compaction_has_left_goes_with_the_next_tidy(root):
    lake = Lake(root)
    for value in range(12):
        lake.write(NAME, frame(value), partition_by=["month"])
    known = disk(lake)
    program = (
        "import os, signal, sys; from mlpkg.data.lake import Lake; from mlpkg.data import rewriting, upkeep\n"
        "rewriting._commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"upkeep.compact(Lake(sys.argv[1]), {NAME!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", program, root]).returncode == -9  # noqa: S603
    left = disk(lake).keys() - known
    assert left and lake.tables() == [NAME] and sorted(lake.read(NAME)["value"]) == sorted([*range(12)] * 2)
    if "://" not in root:
        for path in left:
            os.utime(f"{root}/{NAME}/{path}", (0, 0))
        remove_versions(lake, NAME, now - timedelta(days=1))
        assert not left & disk(lake).keys()


def test_rows_are_found_by_their_texts_after_others_were_deleted(root):
    "In files that deltalake 1.6.6 writes to delete rows, pyarrow cannot look for a text"
    lake = Lake(root)
    lake.write(NAME, pd.DataFrame({"customer": ["ann", "bob", None], "value": [1, 2, 3]}))
    assert delete_rows(lake, NAME, [("customer", "in", ["ann"])]) == 1
    assert lake.read(NAME, ["value"], [("customer", "==", "bob")])["value"].tolist() == [2]
    DeltaTable(f"{root}/{NAME}", storage_options=lake.options).delete("value = 3")
    assert lake.read(NAME, ["value"], [("customer", ">=", "b")])["value"].tolist() == [2]


def test_rows_are_deleted_whoever_writes_meanwhile_and_nothing_is_left_of_an_attempt(root, meanwhile):
    lake, first = Lake(root), [True]
    for value in range(12):
        lake.write(NAME, frame(value), partition_by=["month"])
    lake.write(NAME, pd.DataFrame({"month": ["01"], "value": pd.Series([None], dtype="Int64")}))

    def other():
        if first:
            first.clear()
            Lake(root).write(NAME, frame(3))
            compact(Lake(root), NAME)

    seen = meanwhile(other)
    assert delete_rows(lake, NAME, [("value", "in", [3, 4])]) == 6 and len(seen) > 4
    assert sorted(lake.read(NAME)["value"].dropna()) == sorted([0, 1, 2, *range(5, 12)] * 2)
    assert lake.count(NAME) == 21, "a row without a value stays"
    versions = (lake._open(NAME, version) for version in range(lake.version(NAME) + 1))
    assert disk(lake).keys() == {path for one in versions for path in one.to_pyarrow_dataset().files}


def test_rows_are_deleted_although_their_files_are_replaced_and_removed_before_they_are_read(root, monkeypatch):
    lake, other, read = Lake(root), Lake(root), rewriting.read_files
    for value in range(4):
        lake.write(NAME, frame(value), partition_by=["month"])

    def late(*given):
        monkeypatch.setattr(rewriting, "read_files", read)
        compact(other, NAME, more_than=1)
        forget_history(other, NAME)
        return read(*given)

    monkeypatch.setattr(rewriting, "read_files", late)
    assert delete_rows(lake, NAME, [("value", "==", 2)]) == 2
    assert sorted(lake.read(NAME)["value"]) == sorted([0, 1, 3] * 2)
    for path in live(lake):
        table_folder(lake, NAME).delete_file(path)
    with pytest.raises(FileNotFoundError):
        delete_rows(lake, NAME, [("value", "==", 3)])


def test_what_a_killed_rewriter_leaves_while_history_is_forgotten_is_reported(tmp_path, monkeypatch):
    "It has read its rows before they were deleted"
    lake, clear = Lake(tmp_path), retention._clear_history
    lake.write(NAME, frame(0))
    left = tmp_path / NAME / "rewritten/a1/part-0.parquet"
    monkeypatch.setattr(retention, "patience", 0.6)

    def before(*given):
        found = clear(*given)
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"rows of ann")
        (tmp_path / NAME / "of-a-later-writer.parquet").write_bytes(b"other rows")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(retention, "_clear_history", before)
        told = forget_history(lake, NAME)
    assert told.failed and told.note.startswith("1 file that no commit refers to may hold the same rows")
    for path in (left, tmp_path / NAME / "of-a-later-writer.parquet"):
        os.utime(path, (0, 0))
    assert not forget_history(lake, NAME).failed and not left.exists()


def write_all_the_time(place, stop):
    lake = Lake(place)
    while not stop.is_set():
        lake.write("served/orders", pd.DataFrame({"date": ["2026-01-02"], "sticky": "customer8", "request_id": "r"}))


def test_somebody_is_forgotten_in_a_table_that_others_write_all_the_time(root):
    lake, stop = Lake(root), spawn.Event()
    for name in ("customer7", "customer8"):
        rows = pd.DataFrame({"date": ["2026-01-01"] * 20_000, "sticky": name, "request_id": range(20_000)})
        lake.write("served/orders", rows.astype({"request_id": "str"}), partition_by=["date"])
    jobs = [spawn.Process(target=write_all_the_time, args=(root, stop)) for _ in range(2)]
    for job in jobs:
        job.start()
    try:
        while lake.version("served/orders") < 10:
            time.sleep(0.1)
        done = list(forget(lake, Path("nowhere"), "sticky", "customer7"))
    finally:
        stop.set()
        for job in jobs:
            job.join(60)
    assert [one.note for one in done if one.failed] == [] and [job.exitcode for job in jobs] == [0, 0]
    assert sum(one.count for one in done if one.what == "answers") == 20_000
    assert holders(lake, Path("nowhere"), "customer7") == []


def put_file(lake: Lake, path: str, data: bytes) -> None:
    "Write a file as a process does that is killed before its commit"
    file = table_folder(lake, "").handler._handler.open_output_stream(path)  # what pyarrow wraps around it cannot write
    file.write(data)
    file.close()


def test_whoever_is_forgotten_while_files_wait_for_their_commit_is_told_when_to_try_again(root):
    lake = Lake(root)
    for name in ("customer7", "customer8"):
        lake.write("served/orders", pd.DataFrame({"date": ["2026-01-01"], "sticky": name, "request_id": name}))
    put_file(lake, "served/orders/part-of-a-writer.parquet", b"customer7")
    done = list(forget(lake, Path("nowhere"), "sticky", "customer7"))
    [told] = [one for one in done if one.failed]
    again = datetime.now() + timedelta(hours=1)  # on the clock of this machine
    assert told.where == "served/orders" and "1 file " in told.note
    assert re.search(r"run it again after (\d\d:\d\d)", told.note)[1] in [
        f"{again + timedelta(minutes=minutes):%H:%M}" for minutes in (-1, 0, 1, 2)
    ]
    if "://" not in root:
        os.utime(f"{root}/served/orders/part-of-a-writer.parquet", (0, 0))
        assert not [one for one in forget(lake, Path("nowhere"), "sticky", "customer7") if one.failed]
        assert holders(lake, Path("nowhere"), "customer7") == []


def test_the_lineage_of_both_tables_that_changed_together_is_their_writer(tmp_path, monkeypatch):
    lake, part = Lake(tmp_path), {"month": "01"}
    rows = frame(1, ["01"])
    monkeypatch.setenv("MLFLOW_RUN_ID", "the-writer")
    lake.sources["clean/orders"] = ["the table", 7]
    replace_together(lake, {NAME: rows, "aside/orders": rows}, part)
    assert lake.lineage(NAME) == lake.lineage("aside/orders") == "the-writer"
    told = [DeltaTable(f"{tmp_path}/{name}").history(1)[0]["made_from"] for name in (NAME, "aside/orders")]
    assert told == ['{"clean/orders": ["the table", 7]}'] * 2
    with monkeypatch.context() as patch:
        patch.setattr(together, "settled", lambda lake, name: lake._find(name))  # before it brought its rows in
        with pytest.raises(LakeError, match="not in the table's log"):
            replace_together(lake, {NAME: rows, "aside/orders": rows}, part)
    monkeypatch.setenv("MLFLOW_RUN_ID", "a-reader")
    assert lake.version("aside/orders") == 2 and lake.lineage("aside/orders") == "the-writer"


def test_rows_that_a_changed_table_does_not_take_are_set_aside_and_named(root, monkeypatch):
    lake, part = Lake(root), {"month": "01"}
    rows, other = frame(1, ["01"]), pd.DataFrame({"month": ["01"], "amount": 0.5})
    replace_together(lake, {NAME: rows, "aside/orders": rows}, part)
    put = together.put_down

    def change(*given):
        put(*given)
        lake.write("aside/orders", other, "overwrite", change_schema=True)

    with monkeypatch.context() as patch:
        patch.setattr(together, "put_down", change)
        with pytest.raises(LakeError, match=r"'aside/orders' does not take rows .*/_waiting/aside/orders/\w+: "):
            replace_together(lake, {NAME: frame(2, ["01"]), "aside/orders": frame(2, ["01"])}, part)
    assert (lake.read(NAME)["value"].tolist(), lake.read("aside/orders")["amount"].tolist()) == ([2], [0.5])
    for dry_run in (True, False):
        [found, *others] = tidy_lake(lake, now - timedelta(days=1), dry_run=dry_run)
        assert found.failed and found.count == 0 and "'aside/orders' does not take rows" in found.note
        assert not any(one.failed for one in others)
    replace_together(lake, {NAME: rows, "aside/orders": other}, part)
    list(tidy_lake(lake, now + timedelta(days=1)))
    assert not stored_files(lake, "_waiting")
    assert not list(tidy_lake(lake, now + timedelta(days=1)))[0]


killed_writer = """
import os, signal, sys, numpy as np, pyarrow as pa
from pathlib import Path
from deltalake import write_deltalake
from mlpkg.data.lake import Lake
from mlpkg.data.together import Waiting, put_down

root, table = map(Path, sys.argv[1:])
schema = pa.schema([("value", pa.float64())])

def rows():
    while not any("#" in path.name for path in table.rglob("*")):
        yield pa.record_batch([np.random.rand(100_000)], schema=schema)
    os.kill(os.getpid(), signal.SIGKILL)

stream = pa.RecordBatchReader.from_batches(schema, rows())
if "_waiting" in table.parts:
    put_down(Lake(root), Waiting("aside/orders", "a1", {}), stream)
write_deltalake(table, stream, mode="append")
"""


def test_what_a_killed_writer_has_not_finished_goes_when_it_is_old(tmp_path):
    "On a folder, deltalake does not list it"
    lake, places = Lake(tmp_path), (tmp_path / "_waiting" / "aside" / "orders", tmp_path / NAME)
    lake.write(NAME, pd.DataFrame({"value": [0.5]}))
    for place in places:
        assert subprocess.run([sys.executable, "-c", killed_writer, tmp_path, place]).returncode == -9  # noqa: S603
    drafts = [path for place in places for path in place.rglob("*#*")]
    assert len(drafts) == 2
    assert list(tidy_lake(lake, now - timedelta(days=1))) and all(path.exists() for path in drafts)
    assert forget_history(lake, NAME).failed
    for path in drafts:
        os.utime(path, (0, 0))
    assert sum(one.files for one in tidy_lake(lake, now - timedelta(days=1))) == 2
    assert not any(path.exists() for path in drafts) and lake.count(NAME) == 1


def test_rows_of_a_writer_who_was_killed_while_they_were_put_down_go_when_they_are_old(root):
    lake = Lake(root)
    lake.write(NAME, frame(1))
    whole = Waiting("aside/orders", "a1", {"month": "01"})
    put_down(lake, whole, pa.Table.from_pandas(frame(2), preserve_index=False).to_reader())
    for mark in ("b2", "c3"):
        put_file(lake, f"_waiting/aside/orders/{mark}/part-0.parquet", b"some rows")
    [found, *_] = tidy_lake(lake, now - timedelta(days=1))
    assert not found and len(stored_files(lake, "_waiting")) == 4, "they may still be coming"
    for dry_run in (True, False):
        [found, *_] = tidy_lake(lake, now + timedelta(days=1), dry_run=dry_run)
        assert (found.what, found.count, found.files) == ("rows that waited", 3, 4) and not found.failed
    assert not stored_files(lake, "_waiting") and lake.count(NAME) == 2


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", ["", "aside", "aside/orders"])
def test_files_of_others_in_the_waiting_room_keep_nothing_from_being_tidied(tmp_path, folder):
    "A file manager puts its own into every folder that somebody looks at"
    lake, room = Lake(tmp_path), tmp_path / "_waiting"
    lake.write(NAME, frame(1))
    waiting = Waiting("aside/orders", "a1", {"month": "01"})
    put_down(lake, waiting, pa.Table.from_pandas(frame(2), preserve_index=False).to_reader())
    age_table(Lake(room), "aside/orders/a1", days=100)
    stray = room / folder / ".DS_Store"
    stray.write_bytes(b"view")
    for path in room.rglob("*"):
        os.utime(path, (0, 0))
    for dry_run in (True, False):
        [found, *_] = tidy_lake(lake, now - timedelta(days=10), dry_run=dry_run)
        assert (found.count, found.failed) == (1, False)
    assert [path for path in room.rglob("*") if path.is_file()] == [stray]


def test_a_dry_run_changes_nothing_and_leaves_rows_that_wait_to_whoever_reads_them(tmp_path):
    lake, part = Lake(tmp_path), {"month": "01"}
    rows = frame(1, ["01"])
    before = replace_together(lake, {NAME: rows, "aside/orders": rows}, part)
    lake.write(NAME, frame(2, ["01"]), "replace", part)  # by a writer who was killed before the table that follows
    mark = DeltaTable(f"{tmp_path}/{NAME}").history(1)[0]["write_id"]
    late = pa.Table.from_pandas(frame(2, ["01"]), preserve_index=False).to_reader()
    put_down(lake, Waiting("aside/orders", mark, part, before), late)
    age_table(Lake(tmp_path / "_waiting"), f"aside/orders/{mark}", days=100)
    there = files_below(tmp_path)
    found = list(tidy_lake(lake, now - timedelta(days=10), dry_run=True))
    assert files_below(tmp_path) == there
    assert not any(one.failed for one in found) and found[0].count == 0, "they are brought in, not removed"
    assert list(tidy_lake(lake, now - timedelta(days=10)))[0].count == 0
    assert lake.read("aside/orders")["value"].tolist() == [2]


def test_the_production_profile_looks_for_logs_where_compose_puts_them():
    "The kernel of a step gets no variable of Airflow, so the settings have to say it"
    project = Path(__file__).parent.parent
    compose = (project / "docker-compose.yml").read_text()
    [folder] = re.findall(r"AIRFLOW__LOGGING__BASE_LOG_FOLDER: (\S+)", compose)
    profile = configparser.ConfigParser(interpolation=None)
    profile.read(project / "settings.ini")
    assert profile["production"]["airflow.logs"] == folder


def answer(customer: str) -> Answer:
    when = datetime.now(UTC)
    inputs = json.dumps({"name": customer})
    return Answer(new_request_id(when), 0, when, "champion", "orders", 3, 1, 0.7, inputs, "shop", customer)


def holders(lake: Lake, folder: Path, *texts: str) -> list[str]:
    "Files of the lake's tables, with all columns of Parquet files as text, and of the server that hold a text"
    found = {}
    for table in lake.tables():
        files = table_folder(lake, table)
        for path in stored_files(lake, table):
            with files.open_input_file(path) as file:
                raw = file.read()
            found[f"{table}/{path}"] = raw
            if path.endswith(".parquet"):
                with files.open_input_file(path) as file:
                    found[f"{table}/{path} "] = str(pq.read_table(file).to_pylist()).encode()
    found |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name, data in found.items() if any(text.encode() in data for text in texts))


def test_somebody_is_forgotten_while_the_server_goes_on(root, tmp_path):
    lake, gone, stays = Lake(root), answer("customer7"), [answer("customer8") for _ in range(5)]
    with AnswerLog(lake, "served/orders", tmp_path, seconds=0.5) as first:
        first.put([gone, *stays[:2]])
    Feedback(lake, "served/orders", tmp_path).give([Truth(gone.request_id, 0, 1), Truth(stays[0].request_id, 0, 0)])
    left = answers_folder(tmp_path, "served/orders") / "dead-000001.jsonl"
    left.write_bytes(to_line(gone) + to_line(stays[2]))
    with AnswerLog(lake, "served/orders", tmp_path, seconds=0.5) as server:
        again = answer("customer7")
        server.put([again, stays[3]])
        time.sleep(1)
        assert holders(lake, tmp_path, "customer7")
        done = list(forget(lake, tmp_path, "sticky", "customer7"))
        server.put([stays[4]])
    assert holders(lake, tmp_path, "customer7", gone.request_id, again.request_id) == []
    rows = lake.read("served/orders")
    assert set(rows["request_id"]) | {json.loads(line)["request_id"] for line in _lines(left)} == {
        one.request_id for one in stays
    }
    assert lake.read("feedback/orders")["request_id"].tolist() == [stays[0].request_id]
    assert sum(one.count for one in done if one.what == "answers") >= 2
    assert not [
        one for one in forget(lake, tmp_path, "sticky", "customer7") if one.what in ("answers", "truths") and one
    ]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_server_that_cannot_deliver_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "patience", 0.2)
    folder = answers_folder(tmp_path, "served/orders")
    living = Owner(folder)
    (folder / f"{living.name}-000001.jsonl").write_bytes(to_line(answer("customer7")))
    with pytest.raises(ForgetError, match="Stop it, or see why"):
        list(forget(Lake(tmp_path / "lake"), tmp_path, "sticky", "customer7"))
    living.release()
    list(forget(Lake(tmp_path / "lake"), tmp_path, "sticky", "customer7"))
    assert holders(Lake(tmp_path / "lake"), tmp_path, "customer7") == []


def test_drafts_of_killed_processes_are_forgotten_too(tmp_path):
    "One is killed between the draft of a file and the moment when it takes its place"
    lake, folder = Lake(tmp_path / "lake"), answers_folder(tmp_path, "served/orders")
    folder.mkdir(parents=True)
    waiting = folder / "dead-000001.jsonl"
    waiting.write_bytes(to_line(answer("customer7")) + to_line(answer("customer8")))
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mlpkg.data.lake import Lake\n"
        "from mlpkg.serving.forgetting import forget\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "list(forget(Lake(f'{sys.argv[1]}/lake'), sys.argv[1], 'sticky', 'customer8'))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == -9  # noqa: S603
    assert len(holders(lake, tmp_path, "customer7")) == 2
    with AnswerLog(lake, "served/orders", tmp_path):  # takes over what the dead process has left
        pass
    list(forget(lake, tmp_path, "sticky", "customer7"))
    assert holders(lake, tmp_path, "customer7") == []


def test_a_draft_that_a_living_process_holds_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "patience", 0.2)
    folder = answers_folder(tmp_path, "served/orders")
    living = Owner(folder)
    draft = folder / f"{living.name}-000001.jsonl.0c88bca7.new"
    draft.write_bytes(to_line(answer("customer7")))
    with pytest.raises(ForgetError, match="Stop it, or see why"):
        list(forget(Lake(tmp_path / "lake"), tmp_path, "sticky", "customer7"))
    assert draft.exists()
    living.release()
    list(forget(Lake(tmp_path / "lake"), tmp_path, "sticky", "customer7"))
    assert not draft.exists()


def test_interrupted_after_the_truth_it_finds_the_rest_again(tmp_path, monkeypatch):
    lake, gone = Lake(tmp_path / "lake"), answer("customer7")
    with AnswerLog(lake, "served/orders", tmp_path) as answers:
        answers.put([gone, answer("customer8")])
    Feedback(lake, "served/orders", tmp_path).give([Truth(gone.request_id, 0, 1)])
    steps = forget(lake, tmp_path, "sticky", "customer7")
    next(steps)
    steps.close()
    list(forget(lake, tmp_path, "sticky", "customer7"))
    assert holders(lake, tmp_path, "customer7", gone.request_id) == []


def test_every_run_of_this_project_goes_when_it_is_old_and_nobody_elses(project):
    import mlflow

    from mlpkg.airflow.simulation import record_simulation
    from mlpkg.serving.tidying import remove_old_runs
    from mlpkg.steps.tracking import connect, end_run, open_pipeline_run, start_step
    from mlpkg.testing import add_version

    client, settings = project.mlflow, project.settings
    simulated = record_simulation(settings, pd.DataFrame({"month": ["2013-01"], "champion_score": [0.7]}))
    connect(settings)
    with mlflow.start_run() as tried:
        with mlflow.start_run(nested=True) as nested:
            mlflow.log_metric("loss", 1)
    foreign = client.create_run(client.create_experiment("theirs")).info.run_id
    client.set_terminated(foreign)
    deleted, newest = (open_pipeline_run(client, settings, "train", f"manual__{n}") for n in range(2))
    other = open_pipeline_run(client, settings, "train", "manual__2")
    left = {"registered": start_step(client, settings, "registered", deleted)}
    left |= {name: start_step(client, settings, name, other) for name in ("plain", "standing_in")}
    hit = start_step(client, settings, "standing_in", newest, {"mlpkg.cached_from": left["standing_in"]})
    mlflow.set_experiment("train")
    with mlflow.start_run(run_id=left["registered"]):
        add_version()
    for run_id in (*left.values(), hit, newest, deleted, other):
        end_run(client, run_id, "FINISHED")
    for run_id in (deleted, other):
        client.delete_run(run_id)

    removed = list(remove_old_runs(client, datetime.now(UTC) + timedelta(days=1), settings=settings))
    assert not any(one.failed for one in removed) and {one.where for one in removed} >= {"simulation", "interactive"}
    gone = (simulated, tried.info.run_id, nested.info.run_id, left["plain"])
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in gone} == {"deleted"}
    kept = (foreign, left["registered"], left["standing_in"], hit, newest)
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in kept} == {"active"}


def test_experiments_of_others_with_names_of_ours_keep_their_own_runs(project):
    import mlflow

    from mlpkg.airflow.simulation import record_simulation
    from mlpkg.serving.tidying import remove_old_runs
    from mlpkg.steps.tracking import connect, end_run, open_pipeline_run, start_step

    client, settings, later = project.mlflow, project.settings, datetime.now(UTC) + timedelta(days=1)
    names = ("steps", "simulation", "interactive", "churn")
    theirs = [client.create_run(client.create_experiment(name)).info.run_id for name in names]
    simulated = record_simulation(settings, pd.DataFrame({"month": ["2013-01"], "champion_score": [0.7]}))
    connect(settings)
    with mlflow.start_run() as tried:
        pass
    alone = start_step(client, settings, "count")
    old, newest = (open_pipeline_run(client, settings, "churn", f"manual__{n}") for n in range(2))
    step = start_step(client, settings, "train", old)
    experiment = client.get_run(old).info.experiment_id
    nested, deeper = "", step
    for _ in range(2):
        nested, deeper = deeper, client.create_run(experiment, tags={"mlflow.parentRunId": deeper}).info.run_id
        client.log_text(deeper, "twelve bytes", "loss.txt")
    by_notebook = client.create_run("0", tags={"mlflow.parentRunId": step}).info.run_id  # there MLflow puts it
    for run_id in (*theirs, nested, deeper, by_notebook, alone, step, old, newest):
        end_run(client, run_id, "FINISHED")

    [would] = [one for one in remove_old_runs(client, later, dry_run=True, settings=settings) if one.where == "churn"]
    assert (would.count, would.files, would.bytes) == (1, 2, 24)
    assert not any(one.failed for one in remove_old_runs(client, later, settings=settings))
    kept = (*theirs, simulated, tried.info.run_id, newest)
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in kept} == {"active"}
    gone = (old, step, nested, deeper, by_notebook)
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in gone} == {"deleted"}


def stages(client, *run_ids: str) -> list[str]:
    return [client.get_run(run_id).info.lifecycle_stage for run_id in run_ids]


def finished_runs(client, settings, dag: str, *names: str) -> list[str]:
    from mlpkg.steps.tracking import end_run, open_pipeline_run

    found = [open_pipeline_run(client, settings, dag, name) for name in names]
    for run_id in found:
        end_run(client, run_id, "FINISHED")
    return found


def of_project(settings, name: str):
    "Settings of a machine of another project that uses the same MLflow"
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"project": name})})


def test_two_projects_on_one_mlflow_leave_each_other_alone(project):
    import mlflow

    from mlpkg.airflow.simulation import record_simulation
    from mlpkg.serving.old_runs import remove_old_runs
    from mlpkg.steps.tracking import connect, start_step

    client, later = project.mlflow, datetime.now(UTC) + timedelta(days=1)
    ours, theirs = of_project(project.settings, "ours"), of_project(project.settings, "theirs")
    runs = {}
    for settings in (theirs, ours):
        name = settings.tracking.project
        runs[name] = finished_runs(client, settings, "train", f"{name} 1", f"{name} 2")
        runs[name] += finished_runs(client, settings, name, "manual__1", "manual__2")
        runs[name].append(record_simulation(settings, pd.DataFrame({"month": ["2013-01"], "champion_score": [0.7]})))
        connect(settings)
        with mlflow.start_run() as tried:
            runs[name].append(tried.info.run_id)
        alone = [start_step(client, settings, "count") for _ in range(2)]
        for run_id in alone:
            client.set_terminated(run_id)
        runs[name].append(alone[0])
    for settings in (ours, theirs):
        name = settings.tracking.project
        assert not [one for one in remove_old_runs(client, later, settings=settings) if one.failed]
        assert stages(client, *runs[name]) == ["deleted", "active"] * 2 + ["deleted"] * 3
        if settings is ours:
            assert stages(client, *runs["theirs"]) == ["active"] * 7


def test_what_was_recorded_before_projects_had_names_belongs_to_whose_experiment_it_is(project):
    from mlpkg.serving.old_runs import remove_old_runs

    client, later = project.mlflow, datetime.now(UTC) + timedelta(days=1)
    ours = of_project(project.settings, "ours")
    old = {name: finished_runs(client, of_project(ours, "theirs"), name, "manual__1", "manual__2") for name in "abc"}
    for run_id in (*old["a"], *old["b"]):
        client.delete_tag(run_id, "mlpkg.project")
    client.delete_experiment_tag(client.get_run(old["a"][0]).info.experiment_id, "mlpkg.project")
    list(remove_old_runs(client, later, settings=ours))
    assert [stages(client, old[name][0]) for name in "abc"] == [["deleted"], ["active"], ["active"]]


def test_a_run_that_nobody_works_in_any_more_is_not_going_on(project):
    from mlpkg.serving.old_runs import remove_old_runs
    from mlpkg.steps.owners import heartbeat, owner_tags
    from mlpkg.steps.tracking import experiment_id

    client, settings, now = project.mlflow, project.settings, datetime.now(UTC)
    long_ago = int((now - timedelta(days=500)).timestamp() * 1000)
    interactive = experiment_id(client, "interactive", settings)
    elsewhere = json.loads(owner_tags()["mlpkg.owner"]) | {"machine": "worker-7 3f2a"}
    noted = {"mlpkg.silent": "1700000000.0 1700000000.0"}
    lost = {"mlpkg.owner": json.dumps(elsewhere), **heartbeat(1_700_000_000), **noted}
    dead = json.loads(owner_tags()["mlpkg.owner"]) | {"started": "another process"}
    tags = {
        "no owner": {},
        "lost": lost,
        "dead": {"mlpkg.owner": json.dumps(dead), **heartbeat()},
        "lives": owner_tags(),
        "heard of": {"mlpkg.owner": json.dumps(elsewhere), **heartbeat()},
    }
    runs = {name: client.create_run(interactive, long_ago, each).info.run_id for name, each in tags.items()}
    runs["young"] = client.create_run(interactive, int((now - timedelta(days=2)).timestamp() * 1000)).info.run_id
    runs["above"] = client.create_run(interactive, long_ago).info.run_id
    nested = client.create_run(interactive, long_ago, {"mlflow.parentRunId": runs["above"]}).info.run_id
    client.set_terminated(runs["above"], "KILLED")

    no_limit = settings.model_copy(update={"airflow": settings.airflow.model_copy(update={"run_timeout": 0})})
    assert not list(remove_old_runs(client, now - timedelta(days=365), settings=no_limit))
    [done] = remove_old_runs(client, now - timedelta(days=365), settings=settings)
    gone = [name for name, run_id in runs.items() if stages(client, run_id) == ["deleted"]]
    assert gone == ["no owner", "lost", "dead", "above"] and stages(client, nested) == ["deleted"]
    assert (done.count, done.failed) == (4, False)


def test_a_run_that_cannot_be_removed_does_not_keep_the_others(project, monkeypatch):
    import sqlite3

    from botocore.exceptions import EndpointConnectionError
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    from mlpkg.serving.old_runs import remove_old_runs

    client, settings, later = project.mlflow, project.settings, datetime.now(UTC) + timedelta(days=1)
    runs = finished_runs(client, settings, "train", *map(str, range(5)))
    with sqlite3.connect(settings.tracking.uri.removeprefix("sqlite:///")) as database:
        database.execute("update runs set artifact_uri = 's3x://gone' where run_uuid = ?", [runs[0]])
    really = LocalArtifactRepository.delete_artifacts

    def away(self, *args, **kwargs):
        if runs[1] in self.artifact_dir:
            raise EndpointConnectionError(endpoint_url="http://minio:9000")
        return really(self, *args, **kwargs)

    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", away)
    [done] = remove_old_runs(client, later, settings=settings)
    assert stages(client, *runs) == ["active", "active", "deleted", "deleted", "active"]
    assert done.failed and done.count == 2 and f"; run {runs[0]}: Could not find" in done.note
    assert done.note.startswith(f"2 not done: run {runs[1]}: Could not connect to the endpoint URL")
    client.log_text(runs[1], "again", "notebook.html")
    monkeypatch.undo()
    [done] = remove_old_runs(client, later, settings=settings)
    assert done.count == 1 and stages(client, runs[1]) == ["deleted"]


def test_all_of_a_dag_run_stays_whose_notebook_made_a_model_in_a_run_of_its_own(project):
    import mlflow

    from mlpkg.serving.old_runs import old_runs, versions_in_use
    from mlpkg.steps.tracking import connect, end_run, open_pipeline_run, start_step
    from mlpkg.steps.used_tables import log_tables
    from mlpkg.testing import add_version

    client, settings = project.mlflow, project.settings
    connect(settings)
    whole = open_pipeline_run(client, settings, "train", "manual__1")
    tables = {"raw/orders": 3, "split/orders": 7}
    steps = [start_step(client, settings, name, whole) for name in ("prepare", "fit")]
    for step, (name, version) in zip(steps, tables.items(), strict=True):
        log_tables(client, step, [{"mode": "read", "name": name, "version": version, "uri": ""}])
    experiment = client.get_run(whole).info.experiment_id
    fold = client.create_run(experiment, tags={"mlflow.parentRunId": steps[1]}).info.run_id
    mlflow.set_experiment(experiment_id=experiment)
    with mlflow.start_run(run_id=fold):
        add_version(promoted=False)
    for run_id in (*steps, whole):
        end_run(client, run_id, "FINISHED")
    finished_runs(client, settings, "train", "manual__2")
    assert {name: versions_in_use(client)[name] for name in tables} == {name: {one} for name, one in tables.items()}
    assert old_runs(client, datetime.now(UTC) + timedelta(days=1), settings) == {}


def cached_run(project, dag: str, name: str, earlier: str = "") -> str:
    "A run of a DAG that is over, with one step; an earlier run may stand in for that. The run of the step"
    from mlpkg.steps.tracking import end_run, open_pipeline_run, start_step

    client, settings = project.mlflow, project.settings
    whole = open_pipeline_run(client, settings, dag, name)
    step = start_step(client, settings, "train", whole, {"mlpkg.cached_from": earlier} if earlier else {})
    client.log_text(step, "{}", "notebook/train.ipynb")
    for run_id in (step, whole):
        end_run(client, run_id, "FINISHED")
    return step


def test_a_run_stays_on_which_a_cached_step_has_begun_to_stand_while_others_were_removed(project):
    from mlpkg.serving.old_runs import remove_old_runs

    client, later = project.mlflow, datetime.now(UTC) + timedelta(days=1)
    others = [cached_run(project, "a", f"manual__{number}") for number in range(2)]
    old, chosen = (cached_run(project, "b", f"manual__{number}") for number in range(2))
    removal = remove_old_runs(client, later, settings=project.settings)
    assert next(removal).where == "a" and stages(client, *others) == ["deleted", "active"]
    hit = cached_run(project, "b", "manual__2", earlier=old)
    assert [(one.where, one.count, one.failed) for one in removal] == [("b", 0, False)]
    assert stages(client, old, chosen, hit) == ["active"] * 3
    assert [file.path for file in client.list_artifacts(old)] == ["notebook"]


def test_what_stands_on_an_old_run_goes_before_it_or_both_stay(project, monkeypatch):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    from mlpkg.serving.old_runs import remove_old_runs

    client, later = project.mlflow, datetime.now(UTC) + timedelta(days=1)
    old = cached_run(project, "a", "manual__0")
    hit = cached_run(project, "a", "manual__1", earlier=old)
    newest = cached_run(project, "a", "manual__2")
    really = LocalArtifactRepository.delete_artifacts

    def denied(self, *args, **kwargs):
        if hit in self.artifact_dir:
            raise PermissionError("Access Denied")
        return really(self, *args, **kwargs)

    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", denied)
    [done] = remove_old_runs(client, later, settings=project.settings)
    assert (done.count, done.failed) == (0, True) and stages(client, old, hit) == ["active"] * 2
    monkeypatch.undo()
    for dry_run in (True, False):
        [done] = remove_old_runs(client, later, dry_run, project.settings)
        assert (done.count, done.failed) == (2, False)
    assert stages(client, old, hit, newest) == ["deleted", "deleted", "active"]
