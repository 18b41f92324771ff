"""Files that arrive for a pipeline of `mlpkg new`: what becomes of good and bad ones, and of runs that are killed.

Whole runs in processes of their own, some of which are killed, which no page can show.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import Project, wait_for
from test_new import team_project, wines

from mlpkg.data.lake import Lake

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
