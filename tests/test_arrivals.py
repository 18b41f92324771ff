"""Files that arrive for a pipeline of `mlpkg new`: what becomes of good and bad ones, and of runs that are killed.

Whole runs in processes of their own, some of which are killed, which no page can show.
"""

import gzip
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest
from conftest import Project, wait_for
from test_new import team_project, wines

from mlpkg.data.arrivals import announce_arrivals, arrived_files
from mlpkg.data.lake import Lake
from mlpkg.data.sources import project_path, reading
from mlpkg.data.tabular import read_any
from mlpkg.examples.diamonds import recipe
from mlpkg.recipes import delivery
from mlpkg.recipes.delivery import (
    DeliveryError,
    read_delivery,
    receive_delivery,
    store_delivery,
    stored_batches,
    write_batches,
)

ENTRY = "from mlpkg.cli.main import main; main()"
ODD = '-x, "q" [1]\n(é).csv'


def put(project: Project, name: str, content: pd.DataFrame | bytes, age: float = 300) -> Path:
    "A file that has arrived some seconds ago"
    path = project.root / "incoming" / name
    if isinstance(content, pd.DataFrame):
        content.to_parquet(path) if path.suffix == ".parquet" else content.to_csv(path, index=False)
    else:
        path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def batches(project: Project, table: str = "raw") -> dict[str, int]:
    "How many rows each batch has"
    lake = Lake(project.settings.lake.root)
    if not lake.exists(f"{table}/wine"):
        return {}
    return lake.read(f"{table}/wine")["from_batch"].value_counts().to_dict()


def arrivals(project: Project) -> pd.DataFrame:
    return Lake(project.settings.lake.root).read("arrivals/wine").sort_values("number")


@pytest.fixture(scope="module")
def written(tmp_path_factory, stores) -> Project:
    "A project with a pipeline that expects files"
    project = team_project(tmp_path_factory.mktemp("written"), stores)
    wines().to_csv(project.root / "given.csv", index=False)
    project.mlpkg("new", "wine", "--data", "given.csv", "--target", "wine", PYTHONPATH=str(project.root))
    file = project.root / "settings.ini"
    file.write_text(file.read_text().replace("[model wine]\n", "[model wine]\npipeline.incoming = incoming/*\n"))
    (project.root / "incoming").mkdir()
    return project


@pytest.fixture
def wine(tmp_path, written) -> Project:
    "A copy of it"
    shutil.copytree(written.root, tmp_path, dirs_exist_ok=True)
    return Project(tmp_path)


def look(project: Project, code: int = 0) -> str:
    "Look for files, and take in what is there"
    return project.mlpkg("run", "wine_arrive", "--follow", PYTHONPATH=str(project.root), code=code)


def test_one_bad_file_does_not_keep_the_good_ones_out(wine):
    table = wines()
    put(wine, "good.csv", table.head(60))
    put(wine, ODD, table.iloc[60:90])
    put(wine, "None.csv", table.iloc[90:120])
    put(wine, "narrow, but old.csv", table.head(50).drop(columns=["alcohol"]))
    put(wine, "empty.csv", b"")
    put(wine, "no rows.csv", table.head(0).to_csv(index=False).encode())
    put(wine, "torn.parquet", b"PAR1 and no more")
    put(wine, "spoiled.csv", table.head(40).assign(alcohol=-5.0))
    put(wine, "lists.parquet", table.head(3).assign(hue=[[1], [2], [3]]))
    said = " ".join(look(wine, code=1).split())
    assert "the others have come in, but 5 not" in said and "narrow, but old.csv' lacks columns: alcohol" in said
    assert "mend it where it is, and the next look takes it in" in said
    assert "batch 'spoiled': 40 of 40 rows break the contract" in said
    assert batches(wine, "clean") == {"good": 60, "-x_q_1_é": 30, "None": 30}
    assert batches(wine) == {**batches(wine, "clean"), "spoiled": 40}
    aside = arrivals(wine).query("state == 'aside'").set_index("source")["reason"]
    bad = ("empty.csv", "lists.parquet", "narrow, but old.csv", "no rows.csv", "torn.parquet")
    assert sorted(aside.index) == [f"incoming/{name}" for name in bad]
    assert "is empty" in aside["incoming/empty.csv"]
    (run,) = wine.pipeline_runs("wine_etl")
    assert run.info.status == "FAILED"
    assert {name: step.info.status for name, step in wine.steps(run).items()} == dict.fromkeys(
        ("ingest", "validate", "clean", "split"), "FINISHED"
    )

    said = look(wine)  # what stays the same is not announced again
    assert len(wine.pipeline_runs("wine_etl")) == 1, said
    put(wine, "narrow, but old.csv", table.iloc[120:150], age=200)
    look(wine)
    assert batches(wine)["narrow_but_old"] == batches(wine, "clean")["narrow_but_old"] == 30


def test_a_look_says_what_it_sees_and_waits_for(wine):
    said = " ".join(look(wine).split())
    assert "nothing new in incoming/*" in said and "Executed notebooks" not in said
    put(wine, "young.csv", wines().head(60), age=0)
    said = " ".join(look(wine).split())
    assert "sees incoming/young.csv, and waits until it has not changed for 60 s" in said
    assert "Executed notebooks" not in said and batches(wine) == {}
    put(wine, "young.csv", wines().head(60), age=70)
    put(wine, "torn, still.csv", wines().head(9), age=-3600)  # by a clock that is ahead
    said = " ".join(look(wine).split())
    assert "arrived: incoming/young.csv" in said and "Executed notebooks" in said
    assert "sees incoming/torn, still.csv, and waits until" in said
    said = " ".join(look(wine).split())
    assert "sees incoming/torn, still.csv, and waits until" in said and "young" not in said


def test_files_whose_announcement_nobody_heard_are_announced_again(wine):
    put(wine, "empty.csv", b"")
    put(wine, "torn.parquet", b"PAR1 and no more")
    wine.mlpkg("run", "wine_arrive", PYTHONPATH=str(wine.root))  # without --follow: no run of the ETL hears of it
    assert arrivals(wine)["state"].tolist() == ["announced", "announced"]
    assert "none of 2 files can be taken in" in " ".join(look(wine, code=1).split())
    look(wine)
    assert len(wine.pipeline_runs("wine_etl")) == 1 and batches(wine) == {}


def test_what_a_look_that_was_killed_has_announced_is_announced_again(wine):
    put(wine, "good.csv", wines().head(60))
    put(wine, "other.csv", wines().iloc[60:120])
    process = wine.start(sys.executable, "-c", ENTRY, "run", "wine_arrive", "--follow", PYTHONPATH=str(wine.root))
    lake = Lake(wine.settings.lake.root)
    wait_for(lambda: lake.exists("arrivals/wine") and len(arrivals(wine)), 120, "the announcement")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert batches(wine) == {}
    look(wine)
    assert batches(wine) == batches(wine, "clean") == {"good": 60, "other": 60}
    version = lake.version("raw/wine")
    look(wine)
    assert lake.version("raw/wine") == version


SAMPLE = pd.read_csv(project_path(recipe.sample))


@contextmanager
def serving(answer: Callable[[str], tuple[bytes, int]]) -> Iterator[str]:
    "A web server whose answer to a path is a body and the length that it promises"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, length = answer(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_with_another_query_does_not_take_the_place_of_the_first(tmp_path):
    lake, halves = Lake(tmp_path, run=""), {"1": SAMPLE.head(100), "2": SAMPLE.tail(50)}

    def answer(path: str) -> tuple[bytes, int]:
        body = halves[path[-1]].to_csv(index=False).encode()
        return body, len(body)

    with serving(answer) as web:
        first, second = (f"{web}/export.csv?key=hush&part={part}" for part in "12")
        for _ in range(2):  # the same address again is the same batch again
            store_delivery(lake, recipe, receive_delivery(lake, recipe, first))
        with pytest.raises(DeliveryError, match="would be replaced by rows of .*fetch it first") as refused:
            receive_delivery(lake, recipe, second)
        assert "hush" not in str(refused.value) and "export.csv?...' --param replace=true" in str(refused.value)
        assert len(receive_delivery(lake, recipe, second, replace=True).rows) == len(halves["2"].drop_duplicates())
        assert list(read_delivery(recipe, [first, second]).aside.values())[0].endswith(
            "fetch it first under another name"
        )
    rows = lake.read(recipe.table("raw"))
    assert len(rows) == len(halves["1"].drop_duplicates()) and not rows["from_source"].str.contains("hush").any()


def test_a_file_whose_connection_broke_is_read_once_more():
    body, asked = SAMPLE.to_csv(index=False).encode(), list[str]()

    def answer(path: str) -> tuple[bytes, int]:
        asked.append(path)
        return body[: len(body) // 2] if len(asked) == 1 else body, len(body)

    with serving(answer) as web:
        found = read_delivery(recipe, f"{web}/export.csv")
    assert len(asked) == 2 and len(found.rows) == len(SAMPLE.drop_duplicates())
    assert "read at the second attempt" in " ".join(found.notes) and "broke off" in " ".join(found.notes)


def test_only_what_a_file_says_is_written_down_as_its_fault(tmp_path, monkeypatch):
    def flaky(source: str, *more):
        if source.endswith("flaky.csv"):
            with reading(source):
                raise ConnectionResetError(104, "Connection reset by peer")
        return read_any(source, *more)

    monkeypatch.setattr(delivery, "read_any", flaky)
    lake, incoming = Lake(tmp_path / "lake", run=""), tmp_path / "incoming"
    incoming.mkdir()
    SAMPLE.head(50).to_csv(incoming / "flaky.csv", index=False)
    SAMPLE.head(50).to_csv(incoming / "good.csv", index=False)
    SAMPLE.to_parquet(incoming / "torn.parquet")
    torn = bytearray((incoming / "torn.parquet").read_bytes())
    torn[100:1100] = b"\xff" * 1000
    (incoming / "torn.parquet").write_bytes(torn)
    (incoming / "cut.csv.gz").write_bytes(gzip.compress(SAMPLE.to_csv(index=False).encode())[:500])

    def look(run: str) -> set[str]:
        there = arrived_files(f"{incoming}/*", settled=0)
        return {Path(one).name for one in announce_arrivals(lake, recipe.name, there, run, over=lambda *_: True)}

    assert look("monday") == {"good.csv", "flaky.csv", "torn.parquet", "cut.csv.gz"}
    received = receive_delivery(lake, recipe, [str(one) for one in sorted(incoming.iterdir())])
    assert sorted(Path(one).name for one in received.aside) == ["cut.csv.gz", "flaky.csv", "torn.parquet"]
    store_delivery(lake, recipe, received)
    assert look("tuesday") == {"flaky.csv"}


def test_which_batches_there_are_is_known_without_their_rows(tmp_path):
    lake, names = Lake(tmp_path, run=""), ["2013-01", "2013-02"]
    write_batches(lake, "clean/parcels", pd.DataFrame({"from_batch": names * 3, "distance": 1.0}), names)
    write_batches(
        lake, "clean/parcels", pd.DataFrame({"from_batch": ["2013-03"], "distance": 1.0}), names[1:] + ["2013-03"]
    )
    files = list(tmp_path.rglob("*.parquet"))
    assert files
    for file in files:
        file.unlink()
    assert stored_batches(lake, "clean/parcels") == ["2013-01", "2013-03"]
