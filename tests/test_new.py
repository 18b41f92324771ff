"""`mlpkg new`: what it writes for tables that nobody has described, whether that runs, and what it refuses.

Each pipeline is written into a project of its own, as a team would have one, and goes all the way there: from the file
to a champion, to predictions of a new file, to an answer of the API.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import Project
from fastapi.testclient import TestClient
from sklearn.datasets import load_wine

from mlpkg.data.lake import Lake
from mlpkg.errors import MlpkgError
from mlpkg.models.inspection import InspectionError
from mlpkg.recipes.drafting import draft_pipeline
from mlpkg.recipes.scaffold import check_name_of, find_project
from mlpkg.serving.app import create_app
from mlpkg.settings import load_settings
from mlpkg.testing import parcels, settings_text


def patients() -> pd.DataFrame:
    "Two classes; half of the rows are copies, and there are names and numbers of people"
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"Age": rng.integers(29, 78, 400), "Chest pain": rng.integers(0, 4, 400)})
    table["Cholesterol"] = np.where(rng.uniform(size=400) < 0.1, -999, rng.integers(126, 400, 400))
    table["thal"] = rng.choice(["normal", "fixed", "?"], 400)
    table["e-mail"] = [f"p{number}@example.org" for number in range(400)]
    odds = 0.12 * (table["Age"] - 55) + table["Chest pain"] - 1
    table["target"] = (rng.uniform(size=400) < 1 / (1 + np.exp(-odds))).astype(int)
    return pd.concat([table, table]).sample(frac=1, random_state=0, ignore_index=True)


def wines() -> pd.DataFrame:
    "Three classes with names, missing values"
    data = load_wine(as_frame=True)
    names = {0: "Barolo", 1: "Grignolino", 2: "Barbera"}
    table = data.data[["alcohol", "flavanoids", "color_intensity", "hue"]].assign(wine=data.target.map(names))
    table.loc[np.random.default_rng(0).uniform(size=len(table)) < 0.1, "hue"] = np.nan
    return table


def sales() -> pd.DataFrame:
    "A price, with the day on which something was sold and the day on which it was made"
    table = parcels(1200)[["distance", "weight", "carrier"]]
    rng = np.random.default_rng(1)
    days = np.sort(rng.integers(0, 180, len(table)))
    table["sold"] = pd.Timestamp("2026-01-01") + pd.to_timedelta(days, unit="D")
    table["made"] = table["sold"] - pd.to_timedelta(rng.integers(1, 400, len(table)), unit="D")
    table["price"] = (5 + table["distance"] / 40 + days / 30) * rng.lognormal(0, 0.1, len(table))
    return table.round({"price": 2})


@dataclass
class Case:
    "A table, what is asked of it, and what has to be found"

    name: str
    table: pd.DataFrame
    asked: tuple[str, ...]
    found: tuple[str, ...]
    candidate: str
    kind: str


CASES = [
    Case(
        "heart", patients(), ("--target", "target"),
        ("400 of 800 rows are copies", "e_mail: identifies people, left out", "cholesterol: -999 in", "thal: '?' in",
         "target: two classes", "binary"),
        "logistic_regression", "binary",
    ),
    Case("wine", wines(), ("--target", "wine"), ("wine: 3 classes", "multiclass"), "random_forest", "multiclass"),
    Case(
        "sales", sales(), ("--target", "price", "--time", "sold"), ("price: numbers from", "regression"),
        "hist_gradient_boosting", "regression",
    ),
]  # fmt: skip


def team_project(root: Path, stores: Path) -> Project:
    "A project of a team: settings, a package, nothing else"
    from shutil import copytree, ignore_patterns

    (root / "settings.ini").write_text(settings_text())
    (root / "pyproject.toml").write_text(
        '[tool.nbdev]\nlib_path = "team"\nnbs_path = "nbs"\nallowed_cell_metadata_keys = ["tags"]\n'
        'test_setup = "mlpkg.testing:seed"\n\n[tool.ruff]\nline-length = 120\nextend-exclude = ["team"]\n\n'
        '[tool.ruff.lint]\nselect = ["E", "F", "I", "UP", "B"]\n'
    )
    (root / "team").mkdir()
    (root / "team" / "__init__.py").write_text('__version__ = "0.1"\n')
    copytree(stores / "var", root / "var", ignore=ignore_patterns("airflow.cfg"))  # it names the database it came with
    return Project(root)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def made(request, tmp_path_factory, stores):
    "A project in which `mlpkg new` has written a pipeline and a model was trained"
    case = request.param
    project = team_project(tmp_path_factory.mktemp(case.name), stores)
    case.table.to_csv(project.root / "given.csv", index=False)
    env = {"PYTHONPATH": str(project.root)}
    said = project.mlpkg("new", case.name, "--data", "given.csv", *case.asked, **env)
    candidates = f'candidates=["{case.candidate}"]'
    names = (f"{case.name}_etl", f"{case.name}_train")
    trained = project.mlpkg("run", *names, "-p", "source=given.csv", "-p", candidates, "-p", "budget=1", **env)
    return case, project, " ".join(said.split()), trained, env


def test_it_says_what_it_found_and_what_it_did(made):
    case, _, said, _, _ = made
    assert [words for words in case.found if words not in said] == []


def test_what_it_writes_is_clean_short_and_complete(made):
    case, project, _, _, _ = made
    root, steps = project.root, project.root / "nbs" / "pipelines" / case.name
    for how in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *how, "nbs", "dags", "tests"], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    assert {path.stem.rpartition("_")[2] for path in (root / "dags").glob(f"{case.name}_*.py")} == {
        "arrive", "etl", "train", "predict", "monitor", "watch",
    }  # fmt: skip
    assert (steps / "sample.csv").stat().st_size < 100_000
    assert "@example.org" not in (steps / "sample.csv").read_text()
    for path in steps.glob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
        assert all(len(cell.source.splitlines()) <= 20 for cell in nb.cells if cell.cell_type == "code"), path.name
        assert not any("{{" in cell.source or "{%" in cell.source for cell in nb.cells), path.name
    text = (root / "settings.ini").read_text()
    assert f"[model {case.name}]\npipeline.recipe = team.{case.name}:recipe" in text


def test_it_is_trained_compared_with_the_baseline_and_promoted(made):
    case, project, _, trained, _ = made
    assert f"Model {case.name} version 1, alias champion" in trained
    run = project.steps(project.pipeline_runs(f"{case.name}_train")[0])["evaluate"]
    page = "".join(str(cell.get("outputs", "")) for cell in project.stored(run).cells)
    assert "baseline" in page


def test_its_own_tests_are_green(made):
    case, project, _, _, env = made
    chosen = [] if case.name == "heart" else ["-k", "not run_from"]  # A whole run takes half a minute; one is enough
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen, "tests"]
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, env=project.env | env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_file_is_predicted_and_the_lake_is_watched(made):
    case, project, _, _, env = made
    target = case.asked[1]
    case.table.head(50).drop(columns=target).to_csv(project.root / "new.csv", index=False)
    project.mlpkg("run", f"{case.name}_predict", "-p", "source=new.csv", **env)
    project.mlpkg("run", f"{case.name}_predict", f"{case.name}_monitor", **env)
    lake = Lake(project.settings.lake.root)
    said = lake.read(f"predictions/{case.name}")
    assert len(said) >= lake.count(f"clean/{case.name}")
    wanted = {"binary": "probability", "multiclass": "probability_Barolo", "regression": "low"}[case.kind]
    assert wanted in said
    assert {"contract", "drift", "prediction"} <= set(lake.read(f"monitoring/{case.name}")["check"])


def test_a_file_that_arrives_is_taken_in_once_with_all_that_follows(made):
    case, project, _, _, env = made
    if case.name != "wine":  # one is enough: the tasks are the same
        return
    incoming = project.root / "incoming"
    incoming.mkdir()
    case.table.head(60).to_csv(incoming / "later.csv", index=False)
    case.table.tail(60).to_csv(incoming / "last, but one.csv", index=False)
    for name, age in {"later.csv": 300, "last, but one.csv": 200}.items():
        os.utime(incoming / name, (time.time() - age,) * 2)
    file = project.root / "settings.ini"
    file.write_text(file.read_text().replace("[model wine]\n", "[model wine]\npipeline.incoming = incoming/*.csv\n"))
    project.mlpkg("run", "wine_arrive", "--follow", **env)
    lake = Lake(project.settings.lake.root)
    assert set(lake.read("raw/wine")["from_batch"]) == {"given", "later", "last_but_one"}
    assert "later" in set(lake.read("predictions/wine")["from_batch"])
    assert "later" in set(lake.read("monitoring/wine")["from_batch"])
    version = lake.version("raw/wine")
    project.mlpkg("run", "wine_arrive", "--follow", **env)
    assert lake.version("raw/wine") == version
    for name in ("one.csv", "two.csv"):  # two at once are one delivery
        case.table.head(50).to_csv(incoming / name, index=False)
        os.utime(incoming / name, (time.time() - 100,) * 2)
    project.mlpkg("run", "wine_arrive", "--follow", **env)
    assert set(lake.read("raw/wine")["from_batch"]) == {"given", "later", "last_but_one", "one", "two"}


def test_months_of_a_pipeline_can_be_simulated_and_files_cannot(made):
    case, project, _, _, env = made
    empty = {f"MLPKG_{name}": f"{project.root}/again/{place}" for name, place in {"LAKE__ROOT": "lake"}.items()}
    empty |= {"MLPKG_TRACKING__URI": f"sqlite:///{project.root}/again/mlflow.db"}
    asked = ("simulate", "--model", case.name, "--from", "2026-04", "--to", "2026-05", "-p", "budget=0")
    asked += ("-p", "source=given.csv", "-p", f'candidates=["{case.candidate}"]')
    command = [sys.executable, "-c", "from mlpkg.cli.main import main; main()", *asked]

    def simulate(**more: str) -> subprocess.CompletedProcess:  # not in a fork: it imports the package of the team
        env_now = project.env | env | more
        return subprocess.run(command, cwd=project.root, env=env_now, capture_output=True, text=True, timeout=300)

    if case.name != "sales":
        said = simulate(**empty).stderr
        assert f"batches of {case.name} are files, which have no order in time" in " ".join(said.split())
        return
    assert "would know its future" in " ".join(simulate().stderr.split())
    (project.root / "again").mkdir()
    file = project.root / "settings.ini"  # rules for a month of two hundred rows, where `new` has seen them all
    lines = [line for line in file.read_text().splitlines() if not line.startswith("promotion.min_")]
    small = ["promotion.min_rows = 30", "promotion.min_blocks = 3"]
    at = lines.index("[model sales]") + 1
    file.write_text("\n".join([*lines[:at], *small, *lines[at:]]) + "\n")
    done = simulate(**empty)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "month 2026-04" in said and "month 2026-05" in said and "alarm no" in said and "champion 1" in said


def test_the_api_answers_raw_rows(made, monkeypatch):
    case, project, _, _, _ = made
    for name in [name for name in sys.modules if name.partition(".")[0] == "team"]:  # of another case
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(project.root)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    values = {"MLPKG_SERVING__MODEL": case.name, "MLPKG_SERVING__POLL_SECONDS": "3600"}
    settings = load_settings(file=project.root / "settings.ini", env=values)
    request = json.loads((project.root / f"nbs/pipelines/{case.name}/request.json").read_text())
    with TestClient(create_app(settings), "http://localhost", client=("127.0.0.1", 1)) as api:
        answer = api.post("/v1/predict", json=request)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"]) == 2
        if case.name == "heart":  # the file's own codes for what is not known
            record = {**request["records"][0], "cholesterol": -999, "thal": "?"}
            known = {**record, "cholesterol": None, "thal": None}
            both = api.post("/v1/predict", json={"records": [record, known]}).json()["predictions"]
            assert both[0] == both[1]


def test_once_more_with_other_data_it_shows_how_the_contract_would_change(made):
    case, project, _, _, env = made
    before = {path: path.read_bytes() for path in project.root.rglob("*.ipynb")}
    column = {"heart": "Age", "wine": "alcohol", "sales": "distance"}[case.name]
    case.table.assign(**{column: case.table[column] * 10}).to_csv(project.root / "larger.csv", index=False)
    said = project.mlpkg("new", case.name, "--data", "larger.csv", *case.asked, **env)
    assert "exists already, so nothing is written" in said
    assert f'+"{column.lower()}": number_column(' in said
    assert {path: path.read_bytes() for path in project.root.rglob("*.ipynb")} == before


def refused(folder: Path, table: pd.DataFrame | str | bytes, target: str = "y", **asked: object) -> str:
    "What is said to a table that cannot become a model"
    path = folder / "given.csv"
    if isinstance(table, pd.DataFrame):
        table.to_csv(path, index=False)
    else:
        path.write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises(MlpkgError) as found:
        draft_pipeline("given", str(path), target, **asked)
    return str(found.value)


def frame(rows: int = 60, **columns: object) -> pd.DataFrame:
    return pd.DataFrame({"x": np.arange(rows) % 7 + 0.5, "y": np.arange(rows) % 2, **columns})


@pytest.mark.parametrize(
    ("table", "asked", "words"),
    [
        ("", {}, "is empty"),
        ("x,y\n", {}, "has columns but no rows"),
        (frame(), {"target": "z"}, "no column 'z' for the target (there are: x, y)"),
        (frame(y=1, z=range(60)), {}, "only 1 in 60 rows, so there is nothing to learn"),
        (frame(y=None), {}, "target 'y' is missing in all 60 rows"),
        (frame(y=[f"case {n}" for n in range(60)]), {}, "60 classes in 60 rows"),
        (frame(3), {}, "3 rows that differ are too few to learn from and to judge"),
        (frame(), {"time": "x"}, "column 'x' of"),
        (frame(when="soon"), {"time": "when"}, "does not hold times, or not all of them can be read: found 'soon'"),
        (frame(), {"time": "when"}, "no column 'when' for --time"),
        (frame(), {"group": "patient"}, "no column 'patient' for --group"),
        (frame(y=np.arange(60) % 9), {"kind": "binary"}, "9 values, where a binary label has two"),
        (frame(y=["a", "b"] * 30), {"kind": "regression"}, "'a' is not a number, so this is not a regression"),
        ("x,x,y\n1,2,0\n", {}, "has several columns 'x': rename all but one"),
        ("x,,y\n1,2,0\n", {}, "has a column without a name"),
        ("a b,a_b,y\n1,2,0\n", {}, "columns 'a b' and 'a_b' would both be 'a_b': rename one"),
        (b"\x00\x01\x02\x03" * 50, {}, "is not a text file"),
        (frame(x=1, id=range(60)), {}, "no column is left to predict y from"),
    ],
)
def test_bad_tables_are_refused_in_words(tmp_path, table, asked, words):
    asked = dict(asked)
    assert words in refused(tmp_path, table, asked.pop("target", "y"), **asked)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MlpkgError, match="nowhere.csv' cannot be read"):
        draft_pipeline("given", str(tmp_path / "nowhere.csv"), "y")


def test_files_of_other_habits_are_read(tmp_path):
    text = "Größe;Preis €\n" + "".join(f"{n % 9},5;{1000 + 3 * (n % 50)},25\n" for n in range(200))
    for encoding in ("cp1252", "utf-8-sig", "utf-16"):
        (tmp_path / "given.csv").write_bytes(text.encode(encoding))
        made = draft_pipeline("given", str(tmp_path / "given.csv"), "Preis €")
        assert (made.task.kind, made.label, list(made.found.columns)) == ("regression", "preis", ["größe", "preis"])
        assert made.found.table["größe"].max() == 8.5


def test_texts_that_look_like_missing_values_are_named(tmp_path):
    frame(y=["None", "some", "much"] * 20, z=["NA", "ZA"] * 30).to_csv(tmp_path / "given.csv", index=False)
    said = " ".join(draft_pipeline("given", str(tmp_path / "given.csv"), "y").notes)
    assert "y: 'None' in 20 of 60 values is taken as missing: list it in the contract" in said
    assert "z: 'NA' in 30 of 60 values is taken as missing" in said


def test_a_wide_table_is_drafted_with_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(120, 2000)), columns=[f"gene {n}" for n in range(2000)])
    table.assign(y=(table["gene 7"] > 0).map({True: "ill", False: "well"})).to_csv(tmp_path / "given.csv", index=False)
    made = draft_pipeline("genes", str(tmp_path / "given.csv"), "y")
    assert any("features: the contract gets long" in words for words in made.warnings)
    assert len(made.sample().to_csv()) < 3_000_000


def test_names_that_cannot_be_pipelines_are_refused(tmp_path, stores):
    project = find_project(team_project(tmp_path, stores).root)
    for name in ("Heart", "heart rate", "1st", "import", "maintenance", "settings", "json", ""):
        with pytest.raises(MlpkgError, match="pipeline"):
            check_name_of(name, project)


def test_a_pipeline_whose_name_is_taken_by_something_else_is_not_touched(tmp_path, stores):
    project = team_project(tmp_path, stores)
    (project.root / "dags").mkdir(exist_ok=True)
    (project.root / "dags" / "heart_etl.py").write_text("# mine\n")
    patients().to_csv(project.root / "given.csv", index=False)
    said = project.mlpkg("new", "heart", "--data", "given.csv", "--target", "target", code=2)
    assert "dags/heart_etl.py exist already. Choose another name" in " ".join(said.split())
    assert not (project.root / "nbs" / "pipelines").exists()


def test_labels_with_a_gap_are_told(tmp_path):
    frame(y=[0, 1, None] * 20).to_csv(tmp_path / "given.csv", index=False)
    with pytest.raises(InspectionError, match="rows that differ are too few"):
        draft_pipeline("given", str(tmp_path / "given.csv"), "y")
