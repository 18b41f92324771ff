"""Answer log and feedback where a page cannot show them: killed processes, full disks, a lake that is unreachable."""

import asyncio
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import wait_for
from deltalake import DeltaTable, write_deltalake
from filelock import FileLock
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from mlpkg.data.arrow import LakeError
from mlpkg.data.evolution import gain_columns
from mlpkg.data.lake import Lake
from mlpkg.data.log import same_rows
from mlpkg.models.tasks import Task, yes_no
from mlpkg.serving.answer_log import AnswerLog, LakeWriter, answers_folder, compact_files
from mlpkg.serving.answers import Answer, new_request_id, to_line
from mlpkg.serving.arms import ArmsError, read_arms, trial_start
from mlpkg.serving.comparison import compare_arms
from mlpkg.serving.components import _truth_queue
from mlpkg.serving.feedback import Feedback, FeedbackError, Truth, TruthError
from mlpkg.serving.segments import SegmentQueue
from mlpkg.settings import ServingSettings

TABLE = "served/flights"

WRITER = """
import sys, time
from datetime import UTC, datetime
from mlpkg.serving.answer_log import *
from mlpkg.serving.answers import *
from mlpkg.data.lake import Lake

root, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
AnswerLog.adopt_seconds = 0.3
log = AnswerLog(Lake(root + "/lake"), "served/flights", root, seconds=seconds).start()
number = 0
while True:
    now = datetime.now(UTC)
    some = [Answer(new_request_id(), number + i, now, "champion", name, 1, 0, 0.5, "{}") for i in range(5)]
    assert log.put(some) == 5
    number += 5
    time.sleep(0.005)
    if not len(log._buffer):
        print(number, flush=True)
"""


def written(writer: subprocess.Popen, least: int) -> int:
    "Wait until a writer has put more than this many answers on disk"
    return next(number for line in writer.stdout if (number := int(line)) > least)


def kill(writer: subprocess.Popen, sure: int = 0) -> int:
    "Kill a writer with SIGKILL and return how many answers it had on disk"
    writer.kill()
    rest = writer.communicate()[0] if writer.stdout and not writer.stdout.closed else ""
    return int([sure, *(rest or "").split()][-1])


def answer(record: int = 0, request_id: str = "", **changes) -> Answer:
    "An answer of the champion"
    values = {"arm": "champion", "model": "flights", "model_version": 1, "prediction": 0, "probability": 0.25}
    return Answer(request_id or new_request_id(), record, datetime.now(UTC), **{**values, "inputs": "{}", **changes})


def records(lake: Lake) -> list[int]:
    "Numbers of the records that arrived, sorted"
    return sorted(lake.read(TABLE)["record"]) if lake.exists(TABLE) else []


def left(folder: Path, ending: str = "jsonl") -> list[Path]:
    "Files in the folder where answers wait"
    return sorted(answers_folder(folder, TABLE).glob(f"*.{ending}"))


def orphan(folder: Path, *parts: bytes, number: int = 1) -> Path:
    "A segment that a process left behind"
    path = answers_folder(folder, TABLE) / f"0123456789ab-{number:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(parts))
    return path


@pytest.fixture
def lake(tmp_path) -> Lake:
    return Lake(tmp_path / "lake")


@pytest.fixture
def quick(lake, tmp_path):
    "Makes logs that bring answers to the lake at once, and closes them"
    logs = []

    def make(lake=lake, **options) -> AnswerLog:
        logs.append(AnswerLog(lake, TABLE, tmp_path, **{"seconds": 0.1, **options}))
        return logs[-1]

    yield make
    for log in logs:
        log.close(2)


def test_killed_processes_lose_nothing_that_was_on_disk(tmp_path, lake, quick):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pace = {"often": "0.3", "seldom": "600"}
    writers = {name: subprocess.Popen([*command, name, pace[name]], stdout=subprocess.PIPE, text=True) for name in pace}
    try:
        seen = {name: written(writer, 500) for name, writer in writers.items()}
    finally:
        on_disk = {name: kill(writer) for name, writer in writers.items()}
    assert left(tmp_path)
    quick().start()
    wait_for(lambda: not left(tmp_path), 20, "adoption")
    arrived = lake.read(TABLE, ["model", "record"])
    for name in pace:
        found = sorted(arrived["record"][arrived["model"] == name])
        assert found == list(range(len(found)))  # no gaps, and each number once
        assert len(found) >= max(seen[name], on_disk[name])


def test_a_living_process_takes_over_what_a_killed_one_left(tmp_path, lake):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    dead = subprocess.Popen([*command, "dead", "600"], stdout=subprocess.PIPE, text=True)
    alive = subprocess.Popen([*command, "alive", "0.2"], stdout=subprocess.DEVNULL)
    try:
        seen = written(dead, 100)
        wait_for(lambda: lake.exists(TABLE), 30, "the first commit of the other one")
        assert "dead" not in set(lake.read(TABLE)["model"])
        seen = kill(dead, seen)
        wait_for(lambda: "dead" in set(lake.read(TABLE)["model"]), 20, "adoption")
    finally:
        kill(dead)
        kill(alive)
    arrived = sorted(lake.read(TABLE, filters=[("model", "=", "dead")])["record"])
    assert arrived == list(range(len(arrived)))
    assert len(arrived) >= seen


def test_answers_wait_while_the_lake_is_unreachable(tmp_path, lake, quick, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "lake").write_text("not a folder")
    log = quick().start()
    assert log.put([answer(n) for n in range(3)]) == 3
    wait_for(lambda: log.failing, 10, "the failure to be noticed")
    time.sleep(0.5)
    assert (log.waiting, log.stored, log.dropped) == (3, 0, 0)
    assert "answers to the lake" in log.failing
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1  # although it was tried again and again
    (tmp_path / "lake").unlink()
    wait_for(lambda: log.stored == 3, 10, "storing")
    wait_for(lambda: not log.failing, 10, "recovery")
    assert records(lake) == [0, 1, 2]
    assert caplog.records[-1].getMessage() == "answers to the lake: works again"


def test_answers_that_the_lake_did_not_take_are_delivered_after_the_next_start(tmp_path, lake, quick):
    (tmp_path / "lake").write_text("not a folder")
    with quick() as log:
        log.put([answer(n) for n in range(3)])
    assert log.waiting == 3
    (tmp_path / "lake").unlink()
    with quick() as log:
        pass
    assert (log.stored, log.waiting) == (3, 0)
    assert records(lake) == [0, 1, 2]


def test_a_lake_that_hangs_delays_neither_answers_nor_shutdown(tmp_path, lake, quick):
    go_on = threading.Event()

    class Slow(Lake):
        def write(self, *args, **kwargs):
            go_on.wait(20)
            return super().write(*args, **kwargs)

    log = quick(Slow(tmp_path / "lake")).start()
    log.put([answer(0)])
    time.sleep(0.8)
    log.put([answer(1)])
    wait_for(lambda: not len(log._buffer), 5, "the answers to reach the disk")
    begin = time.monotonic()
    log.close(0.5)
    assert time.monotonic() - begin < 2
    assert log.put([answer(2)]) == 0
    assert (log.dropped, log.waiting) == (1, 2)
    with quick() as other:  # the first one still lives, so its segments are its own
        pass
    assert other.stored == 0
    go_on.set()
    wait_for(lambda: log.stored == 2, 10, "storing")
    assert records(lake) == [0, 1]


def test_answers_without_room_in_memory_are_counted(tmp_path, lake, quick):
    log = quick(rows=10)
    assert log.put([answer(n) for n in range(25)]) == 10
    assert log.put([answer()]) == 0
    assert log.dropped == 16
    log.close()
    assert records(lake) == list(range(10))


def test_answers_without_room_on_disk_are_counted(tmp_path, lake, quick):
    (tmp_path / "lake").write_text("not a folder")
    log = quick(rows=4, spill=1).start()
    given = taken = 0
    while taken < 40:
        given += 1
        taken += log.put([answer(given, inputs="x" * 500)])
        time.sleep(0.01)
    wait_for(lambda: not len(log._buffer), 5, "draining")
    assert sum(path.stat().st_size for path in left(tmp_path)) <= 4096
    assert 0 < log.waiting < 10
    assert log.waiting + log.dropped == given


def test_large_inputs_take_more_room(quick):
    log = quick(rows=10)
    assert log.put([answer(inputs="x" * 5000) for _ in range(10)]) == 2


def test_put_from_many_threads_loses_nothing(lake, quick):
    log = quick().start()
    threads = [
        threading.Thread(target=lambda k=k: [log.put([answer(1000 * k + n)]) for n in range(500)]) for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert (log.stored, log.dropped) == (4000, 0)
    assert len(set(records(lake))) == 4000


def test_half_a_line_and_garbage_are_set_aside(tmp_path, lake, quick, caplog):
    orphan(
        tmp_path,
        to_line(answer(1)),
        b"\x00" * 50 + b"\n",
        b'{"record": 2}\n',
        to_line(answer(3)),
        to_line(answer(4))[:70],
    )
    orphan(tmp_path, b"\xff\xfe garbage only", number=2)
    orphan(tmp_path, to_line(answer(5)), number=3)
    orphan(tmp_path, number=4).unlink()
    left_folder = answers_folder(tmp_path, TABLE) / "0123456789ab-000005.jsonl"
    left_folder.mkdir()  # cannot be read at all
    with quick() as log:
        pass
    assert records(lake) == [1, 3, 5]
    assert (log.stored, log.aside, log.failing) == (3, 4, "")
    assert left(tmp_path) == []
    assert [path.stem[-1] for path in left(tmp_path, "bad")] == ["1", "2", "5"]
    assert "000001.jsonl: 3 lines are not answers" in caplog.text


def test_a_process_without_file_handles_keeps_what_it_cannot_read(tmp_path, lake):
    path = orphan(tmp_path, to_line(answer(1)))
    queue = SegmentQueue(path.parent)
    queue.adopt()
    writer, (soft, hard) = LakeWriter(lake, TABLE, queue), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            writer.deliver()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (writer.aside, left(tmp_path)) == (0, [path])
    writer.deliver()
    queue.close()
    assert (records(lake), left(tmp_path)) == ([1], [])


def test_an_answer_that_cannot_be_written_does_not_hold_up_the_others(lake, quick, caplog):
    with quick() as log:
        log.put([answer(0), answer(1, probability=object()), answer(2, inputs='{"tail": "\ud800"}')])
    assert records(lake) == [0, 2]
    assert (log.stored, log.aside) == (2, 1)
    assert "an answer cannot be written down" in caplog.text


def test_a_segment_that_was_committed_but_not_deleted_is_not_written_again(tmp_path, lake, quick, monkeypatch):
    path = orphan(tmp_path, to_line(answer(1)), to_line(answer(2)))
    queue = SegmentQueue(path.parent)
    queue.adopt()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SegmentQueue, "remove", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        LakeWriter(lake, TABLE, queue).deliver()
    queue.close()
    assert records(lake) == [1, 2]
    assert left(tmp_path) == [path]
    orphan(tmp_path, to_line(answer(3)), number=2)
    with quick() as log:
        pass
    assert records(lake) == [1, 2, 3]
    assert (log.stored, left(tmp_path)) == (3, [])


def test_a_commit_that_was_reported_as_failed_is_not_repeated(tmp_path, lake, quick):
    class Liar(Lake):
        lies = 2

        def write(self, *args, **kwargs):
            version = super().write(*args, **kwargs)
            Liar.lies -= 1
            if Liar.lies >= 0:
                raise OSError("the connection was lost after the commit")
            return version

    log = quick(Liar(tmp_path / "lake")).start()
    log.put([answer(1)])
    wait_for(lambda: log.failing, 10, "the first lie")
    log.put([answer(2)])
    wait_for(lambda: log.stored == 2, 10, "storing")
    assert records(lake) == [1, 2]


def test_a_full_disk_leaves_whole_lines(tmp_path):
    code = """
import resource, sys
from mlpkg.serving.segments import SegmentQueue
queue = SegmentQueue(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
queue.append(b"a" * 599 + b"\\n", 1)
try:
    queue.append(b"b" * 599 + b"\\n", 1)
except OSError:
    print("full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
queue.append(b"c" * 599 + b"\\n", 1)
print(queue.rows, queue.size)
queue.close()
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["full", "2", "1200"]
    (path,) = tmp_path.glob("*.jsonl")
    assert [line[:1] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_full_disk_is_emptied_into_the_lake(lake, quick, monkeypatch):
    full, append = threading.Event(), SegmentQueue.append

    def limited(queue, *args):
        if full.is_set():
            raise OSError(28, "No space left on device")
        append(queue, *args)

    monkeypatch.setattr(SegmentQueue, "append", limited)
    log = quick(seconds=0.5, rows=3).start()
    log.put([answer(0)])
    wait_for(lambda: not len(log._buffer), 5, "the answers to reach the disk")
    full.set()
    assert log.put([answer(n) for n in range(1, 5)]) == 3  # one has no room
    wait_for(lambda: "No space left" in log.failing, 5, "the failure to be noticed")
    wait_for(lambda: log.stored == 1, 10, "storing what was on disk")
    assert (log.waiting, log.dropped) == (3, 1)
    full.clear()
    wait_for(lambda: log.stored == 4, 10, "storing the rest")
    assert records(lake) == [0, 1, 2, 3]


def test_old_locks_of_dead_processes_are_removed(tmp_path, quick):
    folder = orphan(tmp_path).parent
    for name, age in (("old", 7200), ("young", 10)):
        (folder / f"{name}.lock").touch()
        os.utime(folder / f"{name}.lock", (time.time() - age,) * 2)
    with quick():
        pass
    assert [path.stem for path in left(tmp_path, "lock")] == ["young"]


def test_small_files_are_compacted(tmp_path, lake, monkeypatch):
    monkeypatch.setattr(LakeWriter, "compact_after", 12)
    queue = SegmentQueue(answers_folder(tmp_path, TABLE))
    writer = LakeWriter(lake, TABLE, queue)
    for n in range(14):
        queue.append(to_line(answer(n)), 1)
        queue.rotate()
        writer.deliver()
    queue.close()
    assert records(lake) == list(range(14))
    assert len(DeltaTable(f"{lake.root}/{TABLE}").file_uris()) == 3
    assert [lake.count(TABLE, version) for version in range(9, 13)] == [10, 11, 12, 12]


def test_answers_are_delivered_also_where_their_small_files_cannot_be_put_together(tmp_path, lake, monkeypatch, caplog):
    monkeypatch.setattr(LakeWriter, "compact_after", 1)
    queue = SegmentQueue(answers_folder(tmp_path, TABLE))
    (queue.folder / "compact.mutex").mkdir()  # no file can be made there
    queue.append(to_line(answer(1)), 1)
    queue.rotate()
    LakeWriter(lake, TABLE, queue).deliver()
    queue.close()
    assert records(lake) == [1]
    assert f"small files of {TABLE} could not be put together" in caplog.text


@pytest.fixture
def deliver(tmp_path, lake):
    "Bring answers to the lake at once, by a server called by name"
    writers: dict[str, LakeWriter] = {}

    def bring(server: str, *answers: Answer) -> None:
        if server not in writers:
            writers[server] = LakeWriter(lake, TABLE, SegmentQueue(tmp_path / server))
        queue = writers[server].queue
        queue.append(b"".join(map(to_line, answers)), len(answers))
        queue.rotate()
        writers[server].deliver()

    yield bring
    for writer in writers.values():
        writer.queue.close()


def test_rows_and_a_table_of_another_version_are_fitted_both_ways(lake, deliver):
    "The table has a column of a later version, and lacks those of this one"
    deliver("this", answer(0))
    rows = lake.table(TABLE).drop_columns(["share", "failed"]).append_column("region", pa.array(["north"]))
    lake.write(TABLE, rows, mode="overwrite", change_schema=True)
    for share in (None, 0.1):
        deliver("that", answer(1, share=share))
        assert ("share" in lake.schema(TABLE).names) == (share is not None)
    assert "failed" not in lake.schema(TABLE).names
    stored = lake.read(TABLE)
    assert sorted(stored["region"].fillna("")) == ["", "", "north"]
    assert sorted(stored["share"].fillna(0)) == [0, 0, 0.1]


@pytest.mark.parametrize("first", ["binary", "multiclass"])
def test_a_table_takes_answers_of_one_kind_of_model(lake, deliver, first):
    answers = {"binary": answer(0), "multiclass": answer(1, kind="multiclass", answer='{"probabilities": {"S": 1.0}}')}
    deliver("one", answers.pop(first))
    before = lake.schema(TABLE)
    with pytest.raises(LakeError):
        deliver("another", *answers.values())
    assert lake.schema(TABLE) == before and len(records(lake)) == 1


def test_a_table_is_looked_at_once_and_again_after_it_has_refused_rows(lake, deliver, monkeypatch):
    looks, schema = [], Lake.schema
    monkeypatch.setattr(Lake, "schema", lambda *args: looks.append(args) or schema(*args))
    for record in range(5):
        deliver("one", answer(record))
    assert len(looks) <= 1
    stored = lake.table(TABLE)
    changed = stored.append_column("region", pa.array(["north"] * 5))
    lake.write(TABLE, changed, mode="overwrite", change_schema=True)
    with pytest.raises(LakeError):
        deliver("one", answer(5))
    deliver("one", answer(6))
    assert records(lake) == list(range(7))


def test_a_column_that_is_gained_keeps_the_log_and_makes_no_new_rows(lake):
    "The table was made by another program, which said nothing about its log"
    place = f"{lake.root}/{TABLE}"
    brief = {"delta.logRetentionDuration": "interval 0 days", "delta.checkpointInterval": "2"}
    write_deltalake(place, pa.table({"record": [1]}), configuration=brief)
    gain_columns(lake, TABLE, pa.schema([("share", pa.float64())]))
    assert len(list(Path(place, "_delta_log").glob("*.checkpoint.parquet"))) == 1  # when an old log is removed
    assert len(DeltaTable(place).history()) == 2
    assert same_rows(SubTreeFileSystem(place, LocalFileSystem()), DeltaTable(place), 1) == 0


@pytest.fixture
def answered_ids(tmp_path, lake) -> list[str]:
    "Three answered requests with two records each; a shadow answered one record too"
    names = [new_request_id() for _ in range(3)]
    with AnswerLog(lake, TABLE, tmp_path) as log:
        log.put([answer(record, name) for name in names for record in (0, 1)])
        log.put([answer(0, names[0], arm="shadow", model_version=2)])
    return names


def test_truth_is_stored_once_and_may_be_corrected(tmp_path, lake, answered_ids):
    feedback = Feedback(lake, TABLE, tmp_path)
    one, two, three = answered_ids
    first = feedback.give(
        [Truth(one, 0, 1), Truth(one, 1, False), Truth(two, 0, 0), Truth(two, 0, 0), Truth(two, 0, 1)]
    )
    assert first.accepted == [one, f"{one}:1", two]
    assert (first.repeated, first.corrected, first.waiting, first.unknown) == ([two], [two], [], [])
    again = feedback.give([Truth(one, 0, 0), Truth(one, 1, 0), Truth(three, 1, 1)])
    assert (again.accepted, again.repeated, again.corrected) == ([f"{three}:1"], [f"{one}:1"], [one])
    stored = lake.read("feedback/flights").sort_values("time")
    assert list(zip(stored["request_id"], stored["record"], stored["truth"], strict=True)) == [
        (one, 0, 1), (one, 1, 0), (two, 0, 0), (two, 0, 1), (one, 0, 0), (three, 1, 1),
    ]  # fmt: skip
    counts = read_arms(lake, "flights").query("arm == 'champion'").set_index(["request_id", "record"])["truth"]
    assert counts.dropna().to_dict() == {(one, 0): 0, (one, 1): 0, (two, 0): 1, (three, 1): 1}


def test_a_correction_counts_also_where_the_clock_of_its_server_is_slow(tmp_path, lake, answered_ids):
    name, later = answered_ids[0], datetime.now(UTC) + timedelta(hours=1)
    row = {"date": name[:10], "request_id": name, "record": 0, "truth": 1, "time": later}
    lake.write("feedback/flights", pd.DataFrame([row]), partition_by=["date"])
    assert Feedback(lake, TABLE, tmp_path).give([Truth(name, 0, 0)]).corrected == [name]
    assert read_arms(lake, "flights").query("record == 0")["truth"].dropna().unique().tolist() == [0]


def test_truth_for_unknown_requests_is_reported_and_not_stored(tmp_path, lake, answered_ids):
    feedback = Feedback(lake, TABLE, tmp_path)
    first = answered_ids[0]
    strange = [
        new_request_id(datetime(2020, 2, 2, tzinfo=UTC)),
        "",
        "42",
        "../../etc/passwd",
        "2026-99-99-" + "f" * 32,
        "é" * 43,
    ]
    found = feedback.give([Truth(name, 0, 1) for name in strange] + [Truth(first, 2, 1), Truth(first, 10**30, 1)])
    assert found.unknown == [*strange, f"{first}:{10**30}"]
    assert found.waiting == [f"{first}:2"]  # a request may come to the lake in parts
    assert lake.count("feedback/flights") == 1
    assert feedback.give([]).accepted == []


@pytest.mark.parametrize("truth", [2, -1, None, "1", 1.0, float("nan"), [1]])
def test_a_list_with_a_wrong_truth_is_refused_as_a_whole(tmp_path, lake, answered_ids, truth):
    with pytest.raises(TruthError, match=r"items\[1\]\.truth: .* is not one of 0, 1"):
        Feedback(lake, TABLE, tmp_path).give([Truth(answered_ids[0], 0, 1), Truth(answered_ids[1], 0, truth)])
    assert not lake.exists("feedback/flights")


def test_truth_before_the_first_answer(tmp_path, lake):
    (tmp_path / "lake").mkdir()
    name = new_request_id(datetime(2026, 1, 1, tzinfo=UTC))
    assert Feedback(lake, TABLE, tmp_path).give([Truth(name, 0, 1)]).unknown == [name]


def test_truth_that_reaches_another_server_before_the_answer_reaches_the_lake_is_kept(tmp_path, lake):
    "Two servers without a disk in common; the one that has answered brings its answers to the lake at the end"
    name, other = new_request_id(), Feedback(lake, TABLE, tmp_path / "other")
    (tmp_path / "lake").mkdir()
    with AnswerLog(lake, TABLE, tmp_path / "one", seconds=600) as log:
        log.put([answer(0, name), answer(1, name)])
        assert other.give([Truth(name, 0, 1)]).waiting == [name]
        assert other.give([Truth(name, 0, 1)]).repeated == [name]
        assert other.give([Truth(name, 0, 0)]).corrected == [name]
        assert not lake.exists(TABLE)
    assert other.give([Truth(name, 1, 1)]).accepted == [f"{name}:1"]
    assert read_arms(lake, "flights").set_index("record")["truth"].to_dict() == {0: 0, 1: 1}


def test_truth_is_taken_without_reading_the_answers_that_wait_on_the_disk(tmp_path, lake, answered_ids):
    (answers_folder(tmp_path, TABLE) / "unreadable.jsonl").mkdir()
    found = Feedback(lake, TABLE, tmp_path).give([Truth(answered_ids[0], 0, 1), Truth(new_request_id(), 0, 1)])
    assert found.accepted == [answered_ids[0]] and len(found.waiting) == 1


def test_truth_is_stored_also_where_its_small_files_cannot_be_put_together(
    tmp_path, lake, answered_ids, monkeypatch, caplog
):
    monkeypatch.setattr(LakeWriter, "compact_after", 1)
    feedback = Feedback(lake, TABLE, tmp_path)
    (feedback.folder / "compact-feedback.mutex").mkdir(parents=True)  # no file can be made there
    assert feedback.give([Truth(answered_ids[0], 0, 1)]).accepted == [answered_ids[0]]
    assert "small files of feedback/flights could not be put together" in caplog.text


def test_the_lock_is_free_while_small_files_are_put_together(tmp_path, lake, answered_ids, monkeypatch):
    monkeypatch.setattr(LakeWriter, "compact_after", 1)
    feedback, free = Feedback(lake, TABLE, tmp_path), []

    def look(*given: object, **more: object) -> None:
        with FileLock(feedback.folder / "feedback.mutex", timeout=0):
            free.append(given[1])
        compact_files(*given, **more)

    monkeypatch.setattr("mlpkg.serving.feedback.compact_files", look)
    assert feedback.give([Truth(answered_ids[0], 0, 1)]).accepted == [answered_ids[0]]
    assert free == ["feedback/flights"]


def test_truth_is_taken_while_small_files_are_put_together_for_long(tmp_path, lake, answered_ids, monkeypatch):
    "It takes longer than a request may wait"
    monkeypatch.setattr(LakeWriter, "compact_after", 1)
    feedback, end, begun = Feedback(lake, TABLE, tmp_path), threading.Event(), []

    def slow(*given: object, **more: object) -> None:
        begun.append(given[1])
        end.wait(60)
        compact_files(*given, **more)

    monkeypatch.setattr("mlpkg.serving.feedback.compact_files", slow)
    queue = _truth_queue(feedback, ServingSettings(folder=str(tmp_path), answer_timeout=10))

    async def send() -> list[str]:
        found = []
        for name in answered_ids[:3]:
            found += (await queue.submit(yes_no, [Truth(name, 0, 1)])).accepted
            await asyncio.sleep(0.1)
        return found

    try:
        assert asyncio.run(send()) == answered_ids[:3]
        assert begun == ["feedback/flights"], "once, as long as it is not done"
    finally:
        end.set()
        queue.close()


@pytest.mark.parametrize("wrong", [10**400, float("inf"), "1"], ids=["huge", "infinite", "text"])
def test_a_wrong_truth_does_not_spoil_those_that_came_with_it(tmp_path, lake, answered_ids, wrong):
    one, other, numbers = *answered_ids[:2], Task("regression")
    requests = [
        [Truth(one, 0, 1.5)],
        [Truth(one, 1, 2), Truth(other, 0, wrong)],
        [Truth(one, 0, 1.5), Truth(other, 1, 2)],
    ]
    first, refused, last = Feedback(lake, TABLE, tmp_path).give_together(numbers, requests)
    assert (first.accepted, last.repeated, last.accepted) == ([one], [one], [f"{other}:1"])
    assert isinstance(refused, TruthError) and "items[1].truth" in str(refused)
    assert (lake.count("feedback/flights"), lake.version("feedback/flights")) == (2, 0), "one commit"


def test_truth_is_refused_while_the_lake_is_unreachable(tmp_path, lake, answered_ids):
    feedback = Feedback(lake, TABLE, tmp_path)
    (tmp_path / "lake").rename(tmp_path / "away")
    (tmp_path / "lake").write_text("not a folder")
    with pytest.raises(FeedbackError, match="send it again later"):
        feedback.give([Truth(answered_ids[0], 0, 1)])
    (tmp_path / "lake").unlink()
    (tmp_path / "away").rename(tmp_path / "lake")
    assert feedback.give([Truth(answered_ids[0], 0, 1)]).accepted == [answered_ids[0]]


def test_the_second_of_two_simultaneous_truths_corrects_the_first(tmp_path, lake, answered_ids):
    code = """
import json, sys
from mlpkg.serving.feedback import *
from mlpkg.data.lake import Lake
root, truth, *names = sys.argv[1:]
feedback = Feedback(Lake(root + "/lake"), "served/flights", root)
print("ready", flush=True)
sys.stdin.readline()
results = [feedback.give([Truth(name, record, int(truth))]) for name in names for record in (0, 1)]
print(json.dumps([sum((r.accepted for r in results), []), sum((r.corrected for r in results), [])]))
"""
    start = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    givers = [subprocess.Popen([*start, truth, *answered_ids], **pipes) for truth in "01"]
    for giver in givers:
        assert giver.stdout.readline() == "ready\n"
    for giver in givers:
        giver.stdin.write("\n")
        giver.stdin.flush()
    (yes, refused), (other, other_refused) = (json.loads(giver.communicate()[0]) for giver in givers)
    everything = Counter(f"{name}{record}" for name in answered_ids for record in ("", ":1"))
    assert Counter(yes + other) == everything
    assert Counter(refused + other_refused) == everything
    assert lake.count("feedback/flights") == 12


def arm(name: str, version: int, n: int, begin: datetime, skill: float, seed: int = 0, names=None) -> pd.DataFrame:
    "Answers of an arm, one a minute, with the outcome; the greater the skill, the better they predict it"
    rng = np.random.default_rng(seed)
    outcome = np.arange(n) % 4 == 0
    p = 1 / (1 + np.exp(1 - skill * outcome - rng.normal(0, 1, n)))
    times = [begin + timedelta(minutes=i) for i in range(n)]
    names = [new_request_id(time) for time in times] if names is None else names
    about = {"date": [each[:10] for each in names], "request_id": names, "record": 0, "arm": name, "sticky": ""}
    return pd.DataFrame(
        {**about, "model_version": version, "time": times, "probability": p, "truth": outcome.astype(int)}
    )


def live(lake: Lake, *arms: pd.DataFrame, truth: float = 1.0) -> None:
    "Store answers, and the truth for a share of them"
    rows = pd.concat(arms)
    lake.write(TABLE, rows.drop(columns="truth"), partition_by=["date"])
    known = rows[["date", "request_id", "record", "time", "truth"]].drop_duplicates("request_id")
    if truth:
        lake.write("feedback/flights", known.iloc[: int(len(known) * truth)], partition_by=["date"])


NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)


def test_arms_are_compared_over_the_time_they_share_and_by_version(lake):
    "Answers from before the challenger came, and those of a later champion, are left out"
    begin = NOVEMBER + timedelta(days=2)
    live(
        lake,
        arm("champion", 1, 2880, NOVEMBER, -2),  # two days of inverted predictions
        arm("challenger", 2, 300, NOVEMBER, -2),
        arm("champion", 1, 1440, begin, 2, seed=1),
        arm("challenger", 3, 1000, begin, 2, seed=2),
        arm("champion", 3, 500, begin + timedelta(days=5), -2),
    )
    champion, challenger = compare_arms(lake, "flights").itertuples(index=False)
    assert (champion.model_version, champion.n, challenger.model_version, challenger.n) == (1, 1000, 3, 1000)
    assert champion.roc_auc > 0.85
    assert abs(challenger.roc_auc_difference) < 0.05
    assert champion.first == challenger.first == pd.Timestamp(begin)
    later = compare_arms(lake, "flights", since="2026-11-04")
    assert list(later["arm"]) == ["champion"]
    assert "no other arm has answered" in later["words"].iloc[0]


def test_a_request_that_another_arm_answers_again_counts_once(lake):
    "The answers of a server that has no challenger yet were lost, and their clients asked again"
    first = arm("champion", 1, 600, NOVEMBER, 2)
    again = first.assign(arm="challenger", model_version=2, time=first["time"] + timedelta(seconds=2))
    own = arm("challenger", 2, 600, NOVEMBER, 2, seed=1)
    shadow = first.assign(arm="shadow", model_version=3)
    live(lake, again, first, own, shadow)
    champion, challenger = compare_arms(lake, "flights", arm="challenger").itertuples(index=False)
    assert (champion.n, challenger.n) == (600, 600)
    assert compare_arms(lake, "flights", arm="shadow")["n"].tolist() == [600, 600], "a shadow answers the same requests"


def test_only_the_days_of_the_trial_are_read(lake, monkeypatch):
    begin, seen = NOVEMBER + timedelta(days=5), list[pd.DataFrame]()
    live(lake, arm("champion", 1, 7200, NOVEMBER, 2))
    assert trial_start(lake, "flights") == "2026-11-01"
    champion = arm("champion", 1, 2880, begin, 2)
    live(lake, champion, arm("challenger", 2, 1440, begin, 2))
    live(lake, champion[1440:].assign(arm="shadow", model_version=3))
    monkeypatch.setattr("mlpkg.serving.comparison.read_arms", lambda *given: seen.append(read_arms(*given)) or seen[-1])
    for name, day in (("shadow", 7), ("challenger", 6), (None, 7)):
        assert trial_start(lake, "flights", name) == f"2026-11-0{day}"
        assert len(compare_arms(lake, "flights", arm=name)) and seen.pop()["time"].min().day == day
    assert trial_start(lake, "letters") is None


def test_a_shadow_is_compared_on_the_same_requests(lake):
    champion = arm("champion", 1, 800, NOVEMBER, 0.5)
    shadow = arm("shadow", 2, 800, NOVEMBER + timedelta(seconds=1), 2, 1, names=champion["request_id"])
    live(lake, champion, shadow.iloc[::2], truth=0.5)  # the shadow could not keep up
    table = compare_arms(lake, "flights")
    assert list(table["n"]) == [400, 400]
    assert list(table["with_truth"]) == [200, 200]
    assert table["words"].iloc[1].startswith("the shadow is better than the champion: ROC AUC +0.")
    assert "200 of 400 answers of the champion" in table["words"].iloc[1]


@pytest.mark.parametrize(("skills", "words"), [([2.5] * 10, ""), ([1.5] * 7 + [9] * 3, "on these 10 days")])
def test_what_may_be_so_on_some_days_only_is_said(lake, skills, words):
    "By requests alone, both shadows are better; the second one is so because of three days"
    for day, skill in enumerate(skills):
        champion = arm("champion", 1, 200, NOVEMBER + timedelta(days=day), 1.5, day)
        live(lake, champion, arm("shadow", 2, 200, champion["time"].min(), skill, 100 + day, champion["request_id"]))
    said = words_of(lake)
    assert said.startswith("the shadow is better than the champion")
    assert ("other days may differ" in said) == bool(words) and words in said


def test_arms_without_anything_in_common_are_not_compared(lake):
    live(lake, arm("champion", 1, 60, NOVEMBER, 2), arm("shadow", 2, 60, NOVEMBER, 2, seed=1))
    for since in (None, "2030-01-01"):
        with pytest.raises(ArmsError, match="give an earlier first day, or wait"):
            compare_arms(lake, "flights", since)


def test_truth_that_never_comes_is_missing_and_does_not_count_as_negative(lake):
    champion = arm("champion", 1, 400, NOVEMBER, 1)
    live(lake, champion, arm("challenger", 2, 400, NOVEMBER, 1, 1), truth=0)
    before = compare_arms(lake, "flights")
    assert list(before["missing"]) == [400, 400]
    assert before[["roc_auc", "brier", "base_rate", "roc_auc_low"]].isna().all(axis=None)
    assert before["words"].iloc[1].startswith("too early to tell")
    known = champion.drop(columns=["arm", "model_version", "probability", "sticky"])
    lake.write("feedback/flights", known.iloc[:40], partition_by=["date"])
    earlier = known.iloc[:40].assign(truth=1, time=known["time"].min() - timedelta(days=1))
    lake.write("feedback/flights", earlier)  # another truth, which was corrected
    after = compare_arms(lake, "flights")
    assert list(after["with_truth"]) == [40, 0]
    assert after["base_rate"].iloc[0] == 0.25
    assert after["roc_auc_low"].iloc[0] < after["roc_auc"].iloc[0] < after["roc_auc_high"].iloc[0]
    assert "unevenly" in after["words"].iloc[1]


def test_answers_of_a_server_can_be_compared(tmp_path, lake, answered_ids):
    Feedback(lake, TABLE, tmp_path).give([Truth(name, 0, 1) for name in answered_ids])
    table = compare_arms(lake, "flights")
    assert list(table["arm"]) == ["champion", "shadow"]
    assert list(table["with_truth"]) == [1, 1]
    assert "each arm needs at least 10 users or requests of each outcome, there are 0" in table["words"].iloc[1]


def dealt(seed: int, *parts: tuple[int, float, float], hours: int = 24) -> pd.DataFrame:
    "Two equal models, and parts of a trial one after the other: requests, share of the challenger, and mean risk"
    rng, found = np.random.default_rng(seed), []
    for part, (n, share, mean) in enumerate(parts):
        risk = rng.normal(mean, 1, n)
        times = [NOVEMBER + timedelta(hours=hours * part, seconds=20 * i) for i in range(n)]
        names = [new_request_id(time) for time in times]
        about = {"date": [name[:10] for name in names], "request_id": names, "record": 0, "time": times, "sticky": ""}
        challenger = rng.uniform(size=n) < share
        about |= {"arm": np.where(challenger, "challenger", "champion"), "model_version": 1 + challenger}
        p = 1 / (1 + np.exp(-risk - rng.normal(0, 0.5, n)))
        truth = (rng.uniform(size=n) < 1 / (1 + np.exp(-risk))).astype(int)
        found.append(pd.DataFrame({**about, "share": share, "probability": p, "truth": truth}))
    return pd.concat(found, ignore_index=True)


def trial(seed: int) -> pd.DataFrame:
    "After two days the challenger gets half of the requests, which have become harder"
    return dealt(seed, *[(500, 0.1, -3)] * 2, *[(500, 0.5, 0)] * 2)


def words_of(lake: Lake) -> str:
    "What `mlpkg compare` says"
    return compare_arms(lake, "flights")["words"].iloc[-1]


def brier_apart(lake: Lake, **changes) -> float:
    "By how much the Brier scores of the arms differ"
    return compare_arms(lake, "flights", **changes)["brier_difference"].iloc[1]


def test_equal_models_do_not_differ_because_the_share_was_raised(tmp_path):
    "As they are, the arms have requests of different days, and equal models seem to differ"
    differ = Counter()
    for seed in range(20):
        lake = Lake(tmp_path / str(seed))
        live(lake, trial(seed))
        words = compare_arms(lake, "flights")["words"].iloc[1]
        differ.update(word for word in ("better", "worse", "closer", "farther", "something is wrong") if word in words)
    assert differ.total() <= 1, differ


def test_a_part_with_three_answers_of_the_challenger_does_not_decide(lake):
    "Counted by all its answers, the first part would count three times as much as the second"
    rows = dealt(2, (3000, 0.001, -1), (1000, 0.5, -1))
    thin = rows["arm"].eq("challenger") & rows["share"].eq(0.001)
    assert thin.sum() == 3
    rows.loc[thin, "probability"] = 1 - rows.loc[thin, "truth"].astype(float)  # these three are as wrong as can be
    live(lake, rows)
    words, table = words_of(lake), compare_arms(lake, "flights")
    assert "worse" not in words and "farther" not in words
    assert abs(table["brier_difference"].iloc[1] - brier_apart(lake, since="2026-11-02")) < 0.02


def test_days_of_which_no_share_is_known_are_not_joined(lake):
    "The first day, of which the challenger has four answers, was easier; so were those of which the share is known"
    rows = dealt(2, (400, 0.5, -4), (400, 0.01, -4), (400, 0.5, 0))
    assert rows["arm"].eq("challenger").groupby(rows["share"]).sum()[0.01] < 10
    live(lake, rows.assign(share=rows["share"].where(rows["time"] < NOVEMBER + timedelta(days=1))))
    assert abs(brier_apart(lake)) < 0.03
    assert not any(word in words_of(lake) for word in ("better", "worse", "closer", "farther"))


def test_a_share_that_is_raised_at_noon_makes_two_parts_of_a_day(lake):
    rows = dealt(1, (1500, 0.1, -4), (1500, 0.5, 0), hours=12)
    assert rows["date"].nunique() == 1
    as_they_are = ((rows["probability"] - rows["truth"]) ** 2).groupby(rows["arm"]).mean()
    assert as_they_are["challenger"] - as_they_are["champion"] > 0.05
    live(lake, rows)
    assert abs(brier_apart(lake)) < 0.02
    assert not any(word in words_of(lake) for word in ("better", "worse", "closer", "farther", "something is wrong"))


@pytest.mark.parametrize(("users", "late"), [(3, 3), (30, 2)])
def test_users_are_counted_and_not_their_answers(lake, users, late):
    "Forty answers of each user; the second trial has many users, but what is rare happens to two of them"
    parts = []
    for version, name in enumerate(("champion", "challenger"), 1):
        rows, user = arm(name, version, 40 * users, NOVEMBER, 3 * version, version), np.arange(40 * users) % users
        outcome = (user < late) & (np.arange(40 * users) // users % 2 == 0)
        parts.append(rows.assign(share=0.5, sticky=[f"{name} {one}" for one in user], truth=outcome.astype(int)))
    live(lake, *parts)
    words = words_of(lake)
    assert words.startswith(
        f"too early to tell: each arm needs at least 10 users or requests of each outcome, there are {late}; truth"
    )


def test_only_answers_that_count_are_counted(lake):
    "The challenger has truth about the second share alone, in which the rarer outcome is too rare"
    rows = dealt(3, (400, 0.3, 0), (30, 0.5, 0))
    rows.loc[rows["share"].eq(0.3) & rows["arm"].eq("challenger"), "truth"] = np.nan
    lake.write(TABLE, rows.drop(columns="truth"), partition_by=["date"])
    known = rows[["date", "request_id", "record", "time", "truth"]].dropna()
    lake.write("feedback/flights", known, partition_by=["date"])
    rarest = rows[rows["share"].eq(0.5)].groupby("arm")["truth"].agg(lambda one: min(one.sum(), (1 - one).sum())).min()
    assert rarest < 10
    assert f"of each outcome, there are {rarest:.0f}; " in words_of(lake)


def test_truth_about_requests_of_different_shares_is_not_compared(lake):
    rows = dealt(4, (300, 0.3, 0), (300, 0.5, 0))
    lake.write(TABLE, rows.drop(columns="truth"), partition_by=["date"])
    known = rows[rows["arm"].eq("champion") == rows["share"].eq(0.3)]
    lake.write("feedback/flights", known[["date", "request_id", "record", "time", "truth"]], partition_by=["date"])
    table = compare_arms(lake, "flights")
    assert table[["roc_auc_difference", "brier_difference_low"]].iloc[1].isna().all()
    reason = "the other arm has no truth about requests of the same share and day"
    said = f"there are 0; {table['with_truth'].sum()} answers with truth do not count, because {reason}; truth is "
    assert said in table["words"].iloc[1]


def test_arms_without_scatter_are_not_told_apart_nor_called_equal(lake):
    live(lake, dealt(5, (200, 0.5, 0)).assign(probability=0.5))
    table = compare_arms(lake, "flights")
    assert table[["roc_auc_difference_low", "brier_difference_high"]].iloc[1].isna().all()
    words = table["words"].iloc[1]
    assert words.startswith("too early to tell: ROC AUC +0, and the answers scatter too little")
    assert "Brier" not in words


def test_a_shadow_that_says_the_same_is_no_different(lake):
    champion = arm("champion", 1, 200, NOVEMBER, 1)
    live(lake, champion, champion.assign(arm="shadow", model_version=2))
    assert words_of(lake).startswith("no relevant difference: ROC AUC +0 (+0 to +0)")


def test_numbers_without_truth_are_compared_in_words(lake):
    rows = arm("champion", 1, 20, NOVEMBER, 1).assign(kind="regression", answer="{}", prediction=1.5)
    live(lake, rows, rows.assign(arm="shadow", model_version=2), truth=0)
    assert words_of(lake).startswith(
        "too early to tell: each arm needs at least 10 users or requests with truth, there "
    )


@pytest.mark.parametrize("seed", [1, 2, 4, 7])
def test_looking_often_does_not_tell_equal_models_apart(lake, seed):
    "In each of these trials an interval of one look excludes zero at some look; they are four of the first eight"
    rows = dealt(seed, (1600, 0.5, -1))
    for begin in range(0, 1600, 200):
        live(lake, rows.iloc[begin : begin + 200])
        assert "than the champion" not in words_of(lake)


def test_requests_that_an_arm_has_lost_are_noticed(lake):
    "And nothing is concluded from the others; the share of which they were lost is named"
    rows = trial(0)
    lost = rows["arm"].eq("challenger") & rows["share"].eq(0.5) & (rows["probability"] > 0.6)  # of those it says yes to
    live(lake, rows[~lost])
    first, *others = words_of(lake).split("; ")
    assert first.startswith("something is wrong with the requests of the challenger: of ")
    assert " at a share of 0.5 it got " in first
    assert [words[:16] for words in others] == ["find out first", "truth is missing"]


def test_a_request_of_many_records_was_dealt_once(lake):
    rows = dealt(6, (60, 0.5, 0))
    many = rows[rows["arm"] == "challenger"].iloc[[10] * 300].assign(record=range(1, 301))
    live(lake, rows, many)
    assert "something is wrong" not in words_of(lake)


def test_answers_of_a_server_without_shares_are_still_compared(lake):
    live(lake, trial(0).drop(columns="share"))
    table = compare_arms(lake, "flights")
    assert list(table["arm"]) == ["champion", "challenger"]
    assert table["roc_auc_difference_low"].notna().iloc[1]
