"""What steps leave behind: damaged entries, rivals, killed processes, lost machines. A page has one process only."""

import contextlib
import json
import os
import resource
import signal
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import wait_for
from mlflow import MlflowClient

from mlpkg.settings import load_settings
from mlpkg.steps import live
from mlpkg.steps.execution import StepError
from mlpkg.steps.live import latest_notebook
from mlpkg.steps.notebooks import store_notebook
from mlpkg.steps.outbox import conclude, load_entry, locked_entry, upload_or_keep, waiting
from mlpkg.steps.owners import machine
from mlpkg.steps.record import Caching, write_record
from mlpkg.steps.recovery import end_lost, outbox_state, owned_runs, recover
from mlpkg.steps.run import announce, run_step
from mlpkg.steps.tracking import TrackingError, end_run, open_pipeline_run, start_step, step_runs

NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
RUN = "import sys; from mlpkg.steps.run import run_step; run_step(sys.argv[1])"
SLOW = "import os, time\nprint(os.environ['WAREHOUSE_PASSWORD'])\nopen('{marker}', 'w').close()\ntime.sleep(120)"


def abandoned(project, notebook: str = NOTEBOOK):
    "An entry of the outbox as a process that was killed leaves it"
    run_id = start_step(project.mlflow, project.settings, "count")
    with locked_entry(project.settings, "count", run_id) as entry:
        entry.notebook.write_text(notebook)
    return entry


def damage_entry(entry):
    (entry.folder / "entry.json").write_text('{"of": "another version"}')


def damage_tables(entry):
    entry.tables.write_text('{"mode": }\n')


def damage_notebook(entry):
    entry.notebook.write_text(NOTEBOOK[:20])


def damage_record(entry):
    (entry.folder / "record.json").write_text('{"key": "4f1c')


def empty_record(entry):
    (entry.folder / "record.json").write_text("null")


def empty_notebook(entry):
    entry.notebook.write_text("")


def lose_attachment(entry):
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "![plan](attachment:plan.png)"}
    entry.notebook.write_text(NOTEBOOK.replace("[]", json.dumps([cell])))


@pytest.mark.parametrize("damage", [damage_entry, damage_notebook, empty_notebook])
def test_a_damaged_entry_stops_nobody_and_is_reported(project, damage):
    first, second = abandoned(project), abandoned(project)
    damage(first)
    result = run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
    statuses = [project.mlflow.get_run(run_id).info.status for run_id in (result.run_id, second.run_id, first.run_id)]
    assert statuses == ["FINISHED", "KILLED", "KILLED"]
    assert waiting(project.settings) == []
    aside = first.folder.parent / "set-aside" / first.run_id
    assert "cannot be read" in (aside / "reason.txt").read_text()
    for command in ("status", "sync"):
        assert f"{aside} was set aside" in project.look(command)
    assert f"{aside} was set aside" in " ".join(project.mlpkg("doctor", code=1).split())


@pytest.mark.parametrize("damage", [damage_tables, damage_record, empty_record, lose_attachment])
def test_a_small_damage_costs_only_what_is_damaged(project, damage):
    entry = abandoned(project)
    damage(entry)
    run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
    run = project.mlflow.get_run(entry.run_id)
    assert run.info.status == "KILLED" and "count.ipynb" in project.artifacts(run)
    assert waiting(project.settings) == [] and outbox_state(project.settings).aside == {}


@pytest.mark.parametrize("damage", [damage_record, empty_record])
def test_a_step_that_finished_is_recorded_as_such_although_its_record_is_cut_off(project, damage, caplog):
    run_id = start_step(project.mlflow, project.settings, "count")
    with locked_entry(project.settings, "count", run_id) as entry:
        entry.notebook.write_text(NOTEBOOK)
        damage(entry)
        conclude(entry, "FINISHED")
        upload_or_keep(project.mlflow, entry)
    run = project.mlflow.get_run(run_id)
    assert run.info.status == "FINISHED" and "mlpkg.cache.key" not in run.data.tags
    assert waiting(project.settings) == [] and "record.json cannot be read" in caplog.text


def test_a_disk_without_room_leaves_no_part_of_a_record(project):
    about = {"step": "count", "cells": ["x = 1\n" * 500], "env": {}}
    with locked_entry(project.settings, "count", "a" * 32) as entry:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # as a disk that is full after the first part
        try:
            with pytest.raises(OSError):
                write_record(entry.folder, about, Caching(), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert [file.name for file in entry.folder.iterdir() if "record" in file.name] == []


def test_a_run_that_somebody_deleted_stops_nobody(project):
    entry = abandoned(project)
    project.mlflow.delete_run(entry.run_id)
    run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
    assert waiting(project.settings) == []
    assert list(outbox_state(project.settings).aside) == [entry.folder.parent / "set-aside" / entry.run_id]


def test_the_notebook_is_whole_at_every_moment(project):
    cells = ["print('x' * 900_000)"] * 12
    notebook, seen, over = project.notebook("long", "x: int = 1", *cells), [0], threading.Event()

    def watch():
        while not over.is_set():
            for file in (project.root / "var" / "outbox").glob("*/long.ipynb"):
                try:
                    json.loads(file.read_text())
                    seen[0] += 1
                except FileNotFoundError:
                    pass
                except ValueError as error:
                    seen.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run_step(notebook, settings=project.settings)
    over.set()
    watcher.join()
    assert seen[0] > 10 and seen[1:] == []


def test_names_that_mlflow_refuses_and_numbers_that_are_too_large(project):
    long = "isin([" + ", ".join(f"'AIRPORT{n}'" for n in range(80)) + "])"
    found = {long: 3, long + " ": 4, "a<b": 1, "a_b": 2, "../up": 5, "": 6, "seconds": 7, "huge": 10**400}
    cell = f"import scrapbook as sb\nsb.glue('violations', {found!r})\nsb.glue('seconds', -1)"
    result = run_step(project.notebook("glue", "x: int = 1", cell), settings=project.settings)
    assert result.scraps["violations"] == found
    run = project.mlflow.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    measured = {name: value for name, value in run.data.metrics.items() if name.startswith("violations")}
    assert sorted(measured.values())[:7] == [1, 2, 3, 4, 5, 6, 7] and len(measured) == 8
    assert measured["violations.a_b"] == 2
    assert run.data.metrics["seconds"] > 0


@contextlib.contextmanager
def database_trouble(project, table: str, what: str = "RAISE(ABORT, 'no room')", when: str = "1"):
    "MLflow's database takes nothing into a table while the block runs, which its store reports as BAD_REQUEST"
    path = project.settings.tracking.uri.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as database:
        rule = f"CREATE TRIGGER trouble BEFORE INSERT ON {table} WHEN {when} BEGIN SELECT {what}; END"
        database.execute(rule)
        yield
        database.execute("DROP TRIGGER trouble")


NEVER = "zeroblob(2000000000)"  # More than SQLite can store, ever: a DataError, as of a text that is too long


def test_trouble_of_mlflows_database_costs_no_metric(project):
    run_id = start_step(project.mlflow, project.settings, "count")
    with locked_entry(project.settings, "count", run_id) as entry:
        entry.notebook.write_text(NOTEBOOK)
        conclude(entry, "FINISHED")
        with database_trouble(project, "metrics"):
            with pytest.raises(TrackingError, match="no room"):
                upload_or_keep(project.mlflow, entry)
    with database_trouble(project, "metrics"):
        assert recover(project.settings) == []
        assert waiting(project.settings) == [entry.folder]
    assert recover(project.settings) == [run_id]
    run = project.mlflow.get_run(run_id)
    assert run.info.status == "FINISHED" and "seconds" in run.data.metrics


def test_what_the_database_can_never_store_is_kept_as_a_file(project):
    run_id = start_step(project.mlflow, project.settings, "count")
    with locked_entry(project.settings, "count", run_id) as entry:
        entry.notebook.write_text(NOTEBOOK)
        conclude(entry, "FINISHED")
        with database_trouble(project, "metrics", NEVER):
            upload_or_keep(project.mlflow, entry)
    run = project.mlflow.get_run(run_id)
    assert run.info.status == "FINISHED" and "mlpkg.refused.metrics" in run.data.tags
    assert waiting(project.settings) == []


def test_an_entry_that_the_database_can_never_take_is_set_aside(project):
    bad, good = abandoned(project), abandoned(project)
    conclude(bad, "FAILED", {"error": "it ended in poison"})
    with database_trouble(project, "tags", NEVER, "new.value LIKE '%in poison'"):
        result = run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
        runs = [project.mlflow.get_run(run_id) for run_id in (result.run_id, good.run_id, bad.run_id)]
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED", "FAILED"]
    assert waiting(project.settings) == []
    (reason,) = outbox_state(project.settings).aside.values()
    assert "too big" in reason
    assert "was set aside" in project.look("status") and "was set aside" in project.look("doctor", code=1)


def test_texts_are_sent_as_any_database_can_store_them(project):
    "PostgreSQL takes no NUL, and no database half of a surrogate pair"
    notebook = project.notebook("odd", "separator: str = ','", "raise ValueError('a' + separator)")
    with pytest.raises(StepError):
        run_step(notebook, {"separator": "\0;"}, settings=project.settings, tags={"odd": "x\0\ud800"}, name="odd\0")
    experiment = project.mlflow.get_experiment_by_name("steps").experiment_id
    (run,) = project.mlflow.search_runs([experiment])
    found = run.data.params["separator"], run.data.tags["odd"], run.info.run_name
    assert found == (";", "x?", "odd") and "\0" not in str(run.data.tags)


PRODUCE = """
import sys
from mlpkg.settings import load_settings
from mlpkg.steps.outbox import conclude, locked_entry, upload
from mlpkg.steps.tracking import client, start_step
settings = load_settings()
mlflow = client(settings)
for _ in range(25):
    run_id = start_step(mlflow, settings, "stress")
    with locked_entry(settings, "stress", run_id) as entry:
        (entry.folder / "tables.jsonl").touch()
        conclude(entry, "FINISHED")
        upload(mlflow, entry)
"""
RECOVER = """
import sys
from pathlib import Path
from mlpkg.settings import load_settings
from mlpkg.steps.recovery import recover
settings = load_settings()
while not Path(sys.argv[1]).exists():
    if found := recover(settings):
        sys.exit(f"took over {found}")
"""


def test_processes_that_recover_leave_living_entries_alone(project):
    over = project.root / "over"
    rivals = [project.start(sys.executable, "-c", RECOVER, str(over)) for _ in range(3)]
    steps = [project.start(sys.executable, "-c", PRODUCE) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in steps]
    over.touch()
    said += [process.communicate(timeout=60)[0] for process in rivals]
    assert [process.returncode for process in steps + rivals] == [0] * 5, "\n".join(said)
    experiment = project.mlflow.get_experiment_by_name("steps").experiment_id
    runs = project.mlflow.search_runs([experiment])
    assert len(runs) == 50
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not any(name.startswith("mlpkg.failure") for run in runs for name in run.data.tags)
    assert list((project.root / "var" / "outbox").iterdir()) == []


def test_a_killed_step_ended_when_it_was_last_seen(project):
    entry = abandoned(project)
    for file in ("entry.json", "count.ipynb"):
        os.utime(entry.folder / file, (entry.started + 7, entry.started + 7))
    assert recover(project.settings) == [entry.run_id]
    run = project.mlflow.get_run(entry.run_id)
    assert run.data.metrics["seconds"] == pytest.approx(7, abs=0.1)
    assert run.info.end_time == pytest.approx((entry.started + 7) * 1000, abs=100)


def test_an_entry_whose_mlflow_has_another_address_now(project):
    same, other = abandoned(project), abandoned(project)
    for entry, uri in ((same, f"sqlite:///{project.root}/var/../var/mlflow.db"), (other, "http://old:5000")):
        entry.tracking_uri = uri
        entry.save()
    moved = other.folder.rename(other.folder.with_name("e" * 32))
    other = load_entry(moved)
    other.run_id = "e" * 32  # which this store does not have
    other.save()
    assert recover(project.settings) == [same.run_id]
    assert waiting(project.settings) == [moved]
    for command in ("status", "sync"):
        assert "MLFLOW_TRACKING_URI=http://old:5000 mlpkg sync" in project.look(command)


STARTED = """
from mlpkg.settings import load_settings
from mlpkg.steps.tracking import client, start_step
settings = load_settings()
print(start_step(client(settings), settings, "count"))
"""


def test_a_process_that_is_killed_before_its_entry_exists(project):
    process = project.start(sys.executable, "-c", STARTED)
    run_id = process.communicate(timeout=60)[0].splitlines()[-1]
    assert project.mlflow.get_run(run_id).info.status == "RUNNING"
    run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
    run = project.mlflow.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlpkg.failure.error"].endswith("was killed")


@pytest.fixture
def elsewhere(project, monkeypatch):
    "The settings of another machine with the same MLflow, and this process as one of that machine"
    monkeypatch.setattr("mlpkg.steps.owners.machine", lambda: "elsewhere 1")
    steps = project.settings.steps.model_copy(update={"outbox": str(project.root / "elsewhere")})
    return project.settings.model_copy(update={"steps": steps})


def test_another_machine_ends_the_run_of_a_machine_that_is_gone_and_no_living_one(project, elsewhere):
    marker = project.root / "started"
    notebook = project.notebook("slow", "x: int = 1", SLOW.format(marker=marker), "x")
    env = {"MLPKG_STEPS__UPLOAD_SECONDS": "1", "WAREHOUSE_PASSWORD": "a-very-secret-word"}
    process = project.start(sys.executable, "-c", RUN, str(notebook), **env)
    wait_for(marker.exists, what="the second cell")
    experiment = project.mlflow.get_experiment_by_name("steps").experiment_id
    (run,) = project.mlflow.search_runs([experiment])
    listed = project.mlflow.list_artifacts
    wait_for(lambda: listed(run.info.run_id, "live"), 30, "the notebook in MLflow while the step runs")
    assert "a-very-secret-word" not in json.dumps(project.stored(run))

    def beat():
        return project.mlflow.get_run(run.info.run_id).data.tags["mlpkg.heartbeat"]

    # It lives; only the clocks differ by a thousand seconds.
    before = beat()
    assert end_lost(project.mlflow, elsewhere, now=time.time() + 1000) == []
    wait_for(lambda: beat() != before, 30, "another heartbeat")
    assert end_lost(project.mlflow, elsewhere, now=time.time() + 2000) == []

    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # The look before has noted a heartbeat, which is the last one or the last but one.
    ended = [end_lost(project.mlflow, elsewhere, now=time.time() + later) for later in (3000, 4000)]
    assert sum(ended, []) == [run.info.run_id]
    run = project.mlflow.get_run(run.info.run_id)
    assert run.info.status == "KILLED"
    assert "has not been heard of since" in run.data.tags["mlpkg.failure.error"]
    assert "This step was killed in cell 2" in project.stored(run).cells[0].source


def test_an_upload_that_hangs_does_not_replace_the_final_notebook(project, monkeypatch):
    "An upload of the running notebook arrives long after the step has ended"
    hanging, arrived, send = threading.Event(), threading.Event(), threading.Event()

    def hang(mlflow, run_id, path, *args, **kwargs):
        early = project.root / "early" / path.name
        early.parent.mkdir()
        early.write_text(path.read_text())
        hanging.set()
        send.wait(300)
        store_notebook(mlflow, run_id, early, *args, **kwargs)
        arrived.set()

    monkeypatch.setattr(live, "store_notebook", hang)
    monkeypatch.setenv("MLPKG_STEPS__UPLOAD_SECONDS", "0.2")
    wait = f"import os, time\nwhile not os.path.isdir('{project.root}/early'): time.sleep(0.1)\nprint('the end')"
    settings = load_settings(file=project.root / "settings.ini")
    began = time.monotonic()
    result = run_step(project.notebook("hangs", "x: int = 1", wait), settings=settings)
    assert hanging.is_set() and time.monotonic() - began < 60, "the step does not wait for it for long"
    send.set()
    assert arrived.wait(60)
    assert "the end" in str(project.stored(project.mlflow.get_run(result.run_id)))


def test_what_a_step_has_sent_while_it_ran_is_removed_at_its_end(project, monkeypatch):
    monkeypatch.setenv("MLPKG_STEPS__UPLOAD_SECONDS", "0.2")
    settings, listed = load_settings(file=project.root / "settings.ini"), project.mlflow.list_artifacts
    notebook = project.notebook("long", "x: int = 1", "print('first')", "import time\ntime.sleep(4)")
    step = threading.Thread(target=run_step, args=(notebook,), kwargs={"settings": settings})
    step.start()
    (run,) = wait_for(lambda: owned_runs(project.mlflow))
    wait_for(lambda: listed(run.info.run_id, "live"))
    assert latest_notebook(project.mlflow, run.info.run_id, "long") == "live/long.ipynb"
    step.join()
    assert {file.path for file in listed(run.info.run_id)} == {"cache", "notebook"}
    assert latest_notebook(project.mlflow, run.info.run_id, "long") == "notebook/long.ipynb"


def test_a_step_that_was_taken_for_lost_has_the_last_word(project):
    cell = (
        "import os\nfrom mlflow import MlflowClient\n"
        "client, run_id = MlflowClient(), os.environ['MLFLOW_RUN_ID']\n"
        "client.set_tag(run_id, 'mlpkg.failure.error', 'not heard of')\nclient.set_terminated(run_id, 'KILLED')"
    )
    result = run_step(project.notebook("lives", "x: int = 1", cell), settings=project.settings)
    run = project.mlflow.get_run(result.run_id)
    assert run.info.status == "FINISHED" and "mlpkg.failure.error" not in run.data.tags


def test_listings_see_more_than_a_thousand_runs(project):
    monthly = open_pipeline_run(project.mlflow, project.settings, "monthly", "manual__1")
    end_run(project.mlflow, monthly, "FINISHED")
    first = open_pipeline_run(project.mlflow, project.settings, "hourly", "scheduled__0")
    experiment = project.mlflow.get_run(first).info.experiment_id
    tags = {"mlpkg.kind": "pipeline", "mlpkg.dag_id": "hourly", "mlflow.parentRunId": first}
    for number in range(1, 1006):
        project.mlflow.create_run(experiment, tags=tags | {"mlpkg.dag_run_id": f"scheduled__{number}"})
    assert len(step_runs(project.mlflow, first)) == 1005
    assert "monthly" in project.look("status")
    assert "no run of step 'count'" in " ".join(project.look("notebook", monthly, "count", code=2).split())


@contextlib.contextmanager
def refusing_artifacts(project, seconds: float):
    "Id of an experiment whose artifact store needs a while to refuse a file, and the list of its refusals"
    refusals = []

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_PUT()

        def do_PUT(self):
            time.sleep(seconds)
            refusals.append(self.path)
            self.send_error(403)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield project.mlflow.create_experiment("away", f"http://127.0.0.1:{server.server_port}/files"), refusals
    finally:
        server.shutdown()
        server.server_close()


def test_a_step_waits_for_one_entry_of_a_store_that_is_away_and_sync_tries_all(project):
    with refusing_artifacts(project, 1) as (experiment, refusals):
        for _ in range(5):
            run_id = project.mlflow.create_run(experiment).info.run_id
            with locked_entry(project.settings, "count", run_id) as entry:
                entry.notebook.write_text(NOTEBOOK)
        tried = []
        for _ in range(2):
            del refusals[:]
            run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
            tried.append({path.split("/")[2] for path in refusals})
        assert [len(runs) for runs in tried] == [1, 1]
        assert tried[0] != tried[1], "an entry that cannot be brought in does not stand in the way of the others"
        del refusals[:]
        assert "5 left in" in project.look("sync")
        assert len({path.split("/")[2] for path in refusals}) == 5


def test_a_step_spends_little_time_on_a_long_backlog(project, monkeypatch):
    for _ in range(4):
        abandoned(project)
    monkeypatch.setattr("mlpkg.steps.recovery.PATIENCE", 0)
    assert len(recover(project.settings)) == 1
    assert len(recover(project.settings, everything=True)) == 3


def test_entries_that_the_store_does_not_know_let_the_others_pass(project, monkeypatch):
    for number in range(3):
        with locked_entry(project.settings, "count", f"{number:032x}"):
            pass
    mine = abandoned(project)
    monkeypatch.setattr("mlpkg.steps.recovery.PATIENCE", 0)  # each step has the time for one
    assert sum((recover(project.settings) for _ in range(4)), []) == [mine.run_id]


def test_a_look_at_the_outbox_asks_a_server_that_is_away_once(project, monkeypatch):
    asked = []

    class Away(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Away)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        for _ in range(3):
            abandoned(project)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with locked_entry(project.settings, "count", "f" * 32):
            pass
        state = outbox_state(project.settings)
    finally:
        server.shutdown()
        server.server_close()
    assert (state.waiting, list(state.elsewhere.values()), len(asked)) == (1, [3], 1)


def test_close_run_brings_in_its_own_steps_although_another_entry_is_stuck(project, monkeypatch):
    monkeypatch.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))
    from mlpkg.airflow.dags import close_run

    with refusing_artifacts(project, 0) as (experiment, _):
        stuck = project.mlflow.create_run(experiment).info.run_id
        with locked_entry(project.settings, "count", stuck) as entry:
            entry.notebook.write_text(NOTEBOOK)
        run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
        own = start_step(project.mlflow, project.settings, "count", run_id)
        with locked_entry(project.settings, "count", own) as entry:
            entry.notebook.write_text(NOTEBOOK)
            conclude(entry, "FAILED", {"error": "ValueError: no rows"})
        closing = SimpleNamespace(upstream_task_ids={"count"})
        dag = {"dag_id": "small", "tasks": [], "task_ids": ["count"], "get_task": lambda task_id: closing}
        answer = {"manual__1": {"count": "failed"}}
        ti = SimpleNamespace(task=SimpleNamespace(dag=SimpleNamespace(**dag)), get_task_states=lambda *a, **k: answer)
        dag_run = SimpleNamespace(dag_id="small", run_id="manual__1")
        assert close_run.function(dag_run=dag_run, ti=ti) == "FAILED"
    assert project.mlflow.get_run(own).info.status == "FAILED"
    assert [folder.name for folder in waiting(project.settings)] == [stuck]


def closing(states: dict) -> dict:
    "The context of `close_run` in a DAG `small`, whose tasks ended so"
    task = SimpleNamespace(upstream_task_ids=set(states))
    dag = {"dag_id": "small", "tasks": [], "task_ids": list(states), "get_task": lambda task_id: task}
    answer = {"manual__1": states}
    ti = SimpleNamespace(task=SimpleNamespace(dag=SimpleNamespace(**dag)), get_task_states=lambda *a, **k: answer)
    return {"dag_run": SimpleNamespace(dag_id="small", run_id="manual__1"), "ti": ti}


def waiting_steps(project, run_id: str, statuses: list[str]) -> list[str]:
    "Steps of a DAG run that ended while MLflow was away; their MLflow runs"
    found = []
    for number, status in enumerate(statuses):
        tags = {"mlpkg.map_index": str(number)}
        found.append(start_step(project.mlflow, project.settings, "train", run_id, tags, f"train [{number}]"))
        with locked_entry(project.settings, "train", found[-1]) as entry:
            entry.notebook.write_text(NOTEBOOK)
            conclude(entry, status, {"error": "ValueError: no rows"} if status == "FAILED" else None)
    return found


def outcome(project, run_id: str) -> tuple[str, str | None]:
    run = project.mlflow.get_run(run_id)
    return run.info.status, run.data.tags.get("mlpkg.failed_steps")


def test_close_run_brings_in_all_its_own_steps_however_long_that_takes(project, monkeypatch):
    monkeypatch.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))
    monkeypatch.setattr("mlpkg.steps.recovery.PATIENCE", 0)
    from mlpkg.airflow.dags import close_run

    other = abandoned(project)
    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    own = waiting_steps(project, run_id, ["FAILED", "FINISHED", "FINISHED"])
    assert close_run.function(**closing({"train": "failed"})) == "FAILED"
    assert [project.mlflow.get_run(one).info.status for one in own] == ["FAILED", "FINISHED", "FINISHED"]
    assert outcome(project, run_id) == ("FAILED", "train [0]")
    assert [folder.name for folder in waiting(project.settings)] == [other.run_id]


def test_own_steps_that_meet_an_outage_end_the_work_when_the_time_is_over(project, monkeypatch):
    with refusing_artifacts(project, 0) as (experiment, refusals):
        own = [project.mlflow.create_run(experiment).info.run_id for _ in range(4)]
        for run_id in own:
            with locked_entry(project.settings, "count", run_id) as entry:
                entry.notebook.write_text(NOTEBOOK)
        recover(project.settings, first=own)
        assert len({path.split("/")[2] for path in refusals}) == 4
        del refusals[:]
        monkeypatch.setattr("mlpkg.steps.recovery.PATIENCE", 0)
        recover(project.settings, first=own)
        assert len({path.split("/")[2] for path in refusals}) == 1


def test_what_is_known_of_a_step_only_later_corrects_its_pipeline_run(project, monkeypatch):
    monkeypatch.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))
    from mlpkg.airflow.dags import close_run

    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    own = waiting_steps(project, run_id, ["FINISHED", "FAILED", "FINISHED"])
    with monkeypatch.context() as away:  # the entries are on another machine
        away.setattr("mlpkg.airflow.dags.recover", lambda *args, **kwargs: [])
        away.setattr("mlpkg.airflow.dags.end_lost", lambda *args, **kwargs: [])
        assert close_run.function(**closing({"train": "failed"})) == "KILLED"
    ended = project.mlflow.get_run(run_id).info.end_time
    assert outcome(project, run_id) == ("KILLED", "train [0], train [1], train [2]")
    project.look("sync")
    assert [project.mlflow.get_run(one).info.status for one in own] == ["FINISHED", "FAILED", "FINISHED"]
    assert outcome(project, run_id) == ("FAILED", "train [1]")
    assert project.mlflow.get_run(run_id).info.end_time == ended


@contextlib.contextmanager
def away_once_closed(run_id: str):
    "MLflow goes away as soon as a run is closed, until the block ends"
    closes = MlflowClient.set_terminated
    with pytest.MonkeyPatch.context() as patch:

        def away(self, *args, **kwargs):
            raise ConnectionError("MLflow is away")

        def close(self, closed, *args, **kwargs):
            closes(self, closed, *args, **kwargs)
            if closed == run_id:
                for name in ("get_run", "set_tag", "delete_tag", "log_artifact", "search_runs", "search_experiments"):
                    patch.setattr(MlflowClient, name, away)

        patch.setattr(MlflowClient, "set_terminated", close)
        yield


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_a_step_whose_run_was_closed_has_ended_so_although_mlflow_goes_away_then(project, caplog, status):
    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    own = waiting_steps(project, run_id, ["FAILED", status])
    inside = nest(project, own[1])
    end_run(project.mlflow, run_id, "KILLED")  # as where nobody knew yet how its steps had ended
    with away_once_closed(own[1]):
        entry = load_entry(next(folder for folder in waiting(project.settings) if folder.name == own[1]))
        assert upload_or_keep(project.mlflow, entry) == f"mlflow://{own[1]}/notebook/train.ipynb"
        assert "MLflow is away" in caplog.text and entry.folder.is_dir()
    assert statuses(project, own[1]) == [status]
    assert recover(project.settings, everything=True) == own
    missing = "train [0]" if status == "FINISHED" else "train [0], train [1]"
    assert outcome(project, run_id) == ("FAILED", missing)
    assert statuses(project, own[1], *inside) == [status, "FINISHED" if status == "FINISHED" else "KILLED"]
    assert "train.html" in project.artifacts(project.mlflow.get_run(own[1])) and waiting(project.settings) == []


def test_an_entry_of_which_something_is_still_late_is_not_brought_in(project):
    [own] = waiting_steps(project, "", ["FINISHED"])
    with away_once_closed(own):
        assert recover(project.settings) == []
    assert [folder.name for folder in waiting(project.settings)] == [own]
    assert recover(project.settings) == [own] and waiting(project.settings) == []


def test_a_process_killed_after_it_closed_its_run_leaves_a_pipeline_run_that_is_corrected(project):
    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    [own] = waiting_steps(project, run_id, ["FINISHED"])
    end_run(project.mlflow, run_id, "KILLED")
    project.mlflow.set_tag(run_id, "mlpkg.failed_steps", "train [0]")
    entry = load_entry(waiting(project.settings)[0])
    entry.status = ""  # the disk was full when it was concluded
    entry.save()
    project.mlflow.set_terminated(own, "FINISHED")
    assert recover(project.settings) == [own] and outcome(project, run_id) == ("FAILED", None)


@pytest.mark.parametrize("what", ["deleted", "gone", "killed itself", "open"])
def test_pipeline_runs_that_a_late_step_does_not_touch(project, what):
    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    [own] = waiting_steps(project, run_id, ["FINISHED"])
    if what != "open":
        end_run(project.mlflow, run_id, "KILLED", {"error": "the process was killed"} if "itself" in what else None)
    if what in ("deleted", "gone"):
        project.mlflow.delete_run(run_id)
    if what == "gone":
        project.mlflow._tracking_client.store._hard_delete_run(run_id)
    assert recover(project.settings) == [own] and waiting(project.settings) == []
    assert project.mlflow.get_run(own).info.status == "FINISHED"
    if what != "gone":
        assert outcome(project, run_id) == ("RUNNING" if what == "open" else "KILLED", None)


def test_a_folder_without_its_entry_is_set_aside_and_its_run_is_ended(project):
    lost = abandoned(project)
    (lost.folder / "entry.json").unlink()
    (lost.folder.parent / "lost+found").mkdir()  # that of a file system is nobody's entry
    assert "1 waiting for MLflow" in project.look("status")
    assert f"{lost.run_id} was set aside" in project.look("sync")
    assert project.mlflow.get_run(lost.run_id).info.status == "KILLED"
    assert waiting(project.settings) == [] and (lost.folder.parent / "lost+found").exists()


def test_a_run_without_a_heartbeat_does_not_keep_others_from_being_ended(project):
    gone = {"machine": machine(), "pid": 2**22 + 1, "started": "1"}
    runs = []
    for owner, beat in ((gone, "1700000000.0"), (gone, ""), (gone | {"machine": "worker-7 3f2a"}, ""), (gone, "soon")):
        runs.append(start_step(project.mlflow, project.settings, "count"))
        project.mlflow.set_tag(runs[-1], "mlpkg.owner", json.dumps(owner))
        project.mlflow.delete_tag(runs[-1], "mlpkg.heartbeat")
        if beat:
            project.mlflow.set_tag(runs[-1], "mlpkg.heartbeat", beat)
    assert {*runs[:2], runs[3]} <= {*end_lost(project.mlflow, project.settings)}
    later = [end_lost(project.mlflow, project.settings, time.time() + seconds) for seconds in (2000, 4000)]
    assert runs[2] in sum(later, []), "one of another machine was last heard of at its start"


def test_an_entry_whose_run_the_same_store_has_lost_is_reported(project):
    entry = abandoned(project)
    with contextlib.closing(sqlite3.connect(project.settings.tracking.uri.removeprefix("sqlite:///"))) as database:
        for table in ("tags", "latest_metrics", "metrics", "params", "runs"):  # as an older backup has them
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (entry.run_id,))
        database.commit()
    for command in ("sync", "status"):
        assert f"{entry.folder}: its run is unknown to this MLflow" in project.look(command)
    assert "its run is unknown to this MLflow" in " ".join(project.look("doctor", code=1).split())
    assert waiting(project.settings) == [entry.folder]


def test_a_pipeline_run_gets_its_owner_and_heartbeat_together_or_not_at_all(project):
    from mlpkg.airflow.local import held_run

    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    with database_trouble(project, "tags", when="new.key = 'mlpkg.heartbeat'"):
        with contextlib.suppress(Exception), held_run(project.settings):
            announce("pipeline", run_id, "small", "is recorded")
    tags = project.mlflow.get_run(run_id).data.tags
    assert "mlpkg.owner" not in tags and "mlpkg.heartbeat" not in tags


def nest(project, *above: str) -> list[str]:
    "Runs that a notebook has opened in runs, and not closed; one of them in another experiment"
    return [project.mlflow.create_run("0", tags={"mlflow.parentRunId": one}).info.run_id for one in above]


def statuses(project, *run_ids: str) -> list[str]:
    return [project.mlflow.get_run(run_id).info.status for run_id in run_ids]


def test_what_a_notebook_has_opened_ends_with_its_step(project):
    cell = (
        "import mlflow, os, signal\nmlflow.start_run()\nmlflow.start_run(nested=True)\n"
        "print('nested', mlflow.start_run(nested=True).info.run_id)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(StepError):
        run_step(project.notebook("count", cell), settings=project.settings)
    everywhere = [one.experiment_id for one in project.mlflow.search_experiments()]
    found = {run.info.status for run in project.mlflow.search_runs(everywhere)}
    assert len(project.mlflow.search_runs(everywhere)) == 3 and "RUNNING" not in found


@pytest.mark.parametrize("variable", ["MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"])
def test_trials_are_in_the_experiment_of_their_step_wherever_its_process_works(project, monkeypatch, variable):
    elsewhere = project.mlflow.create_experiment("elsewhere")
    monkeypatch.setenv(variable, elsewhere if variable.endswith("ID") else "elsewhere")
    cell = "import mlflow\nwith mlflow.start_run(), mlflow.start_run(nested=True):\n    mlflow.log_metric('auc', 1)"
    alone = run_step(project.notebook("tune", cell), settings=project.settings).run_id
    pipeline = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    below = run_step(project.notebook("tune", cell), parent=pipeline, settings=project.settings).run_id
    for step in map(project.mlflow.get_run, (alone, below)):
        nested = f"tags.`mlflow.parentRunId` = '{step.info.run_id}'"
        [trial] = project.mlflow.search_runs([step.info.experiment_id], nested)
        assert trial.data.metrics == {"auc": 1}
    assert project.mlflow.search_runs([elsewhere, "0"]) == []


def test_runs_that_a_notebook_left_open_do_not_spoil_a_step_that_succeeded(project):
    cell = "from mlflow import MlflowClient\nimport os\nup = os.environ['MLFLOW_RUN_ID']\n" + (
        "MlflowClient().create_run('0', tags={'mlflow.parentRunId': up})"
    )
    run_step(project.notebook("count", cell), settings=project.settings)
    everywhere = [one.experiment_id for one in project.mlflow.search_experiments()]
    assert [run.info.status for run in project.mlflow.search_runs(everywhere)] == ["FINISHED", "FINISHED"]


def test_runs_that_a_notebook_left_open_in_an_experiment_of_its_own_end_with_its_step(project):
    cell = (
        "from mlflow import MlflowClient\nimport os\nmlflow, up = MlflowClient(), os.environ['MLFLOW_RUN_ID']\n"
        "mlflow.create_run(mlflow.create_experiment('trials'), tags={'mlflow.parentRunId': up})"
    )
    run_step(project.notebook("count", cell), settings=project.settings)
    trials = project.mlflow.get_experiment_by_name("trials").experiment_id
    assert [run.info.status for run in project.mlflow.search_runs([trials])] == ["FINISHED"]


def test_whatever_ends_a_run_ends_what_is_open_in_it(project):
    from mlpkg.airflow.dags import conclude_run

    concluded = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    over = start_step(project.mlflow, project.settings, "count", concluded)
    project.mlflow.set_terminated(over, "KILLED")
    orphan = start_step(project.mlflow, project.settings, "train", concluded)
    inside = nest(project, over, orphan)
    deeper = nest(project, *inside)
    assert conclude_run(project.mlflow, concluded, {"count": "failed"}) == "KILLED"
    assert statuses(project, orphan, *inside, *deeper) == ["KILLED"] * 5

    killed = abandoned(project)
    closed = abandoned(project)
    inside = nest(project, killed.run_id, closed.run_id)
    project.mlflow.set_terminated(closed.run_id, "FINISHED")  # the notebook itself did so
    assert {*recover(project.settings)} == {killed.run_id, closed.run_id}
    assert statuses(project, *inside) == ["KILLED", "KILLED"]


def test_a_step_that_lives_keeps_what_it_has_opened_although_its_pipeline_run_is_ended(project):
    run_id = open_pipeline_run(project.mlflow, project.settings, "small", "manual__1")
    living = start_step(project.mlflow, project.settings, "count", run_id)
    inside = nest(project, living, run_id)
    end_run(project.mlflow, run_id, "KILLED", {"error": "the process that ran this DAG was ended"})
    assert statuses(project, living, *inside) == ["RUNNING", "RUNNING", "KILLED"]
