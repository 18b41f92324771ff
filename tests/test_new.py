"""`mlpkg new`: what it writes for tables that nobody has described, whether that runs, and what it refuses.

Each pipeline is written into a project of its own, as a team would have one, and goes all the way there: from the file
to a champion, to predictions of a new file, to an answer of the API.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest
from conftest import Project
from fastapi.testclient import TestClient
from sklearn.datasets import load_breast_cancer, load_wine

from mlpkg.data.lake import Lake
from mlpkg.errors import MlpkgError
from mlpkg.models.inspection import InspectionError, inspect_table
from mlpkg.recipes.delivery import read_delivery
from mlpkg.recipes.drafting import draft_pipeline
from mlpkg.recipes.preparation import split_rows
from mlpkg.recipes.recipe import Recipe
from mlpkg.recipes.revising import draft_again, read_declared, revise
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
    table.loc[:60, "thal"] = table.loc[:60, "thal"].replace("normal", "Normal ")
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


def sales_day_first() -> pd.DataFrame:
    "The same, as a German spreadsheet writes the days, to customers who return"
    table = sales()
    customers = np.random.default_rng(2).integers(0, 150, len(table)) * 7 + 1000
    return table.assign(made=table["made"].dt.strftime("%d.%m.%Y"), customer=customers)


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
         "thal: 'normal' (", "`one_spelling` in clean_heart makes them one", "target: two classes", "binary"),
        "logistic_regression", "binary",
    ),
    Case("wine", wines(), ("--target", "wine"), ("wine: 3 classes", "multiclass"), "random_forest", "multiclass"),
    Case(
        "sales", sales_day_first(), ("--target", "price", "--time", "sold"),
        ("price: numbers from", "regression", "customer: names something that returns in about 8 rows"),
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
    alone = [sys.executable, "-m", "ruff", "check", "--isolated", "--extend-select=E,I,UP,B", "--line-length=120"]
    done = subprocess.run([*alone, root / "team" / f"{case.name}.py"], capture_output=True, text=True)
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
    case.table.tail(20).drop(columns=target).to_csv(project.root / "late, but here.csv", index=False)
    project.mlpkg("run", f"{case.name}_predict", "-p", 'source=["new.csv", "late, but here.csv"]', **env)
    project.mlpkg("run", f"{case.name}_predict", f"{case.name}_monitor", **env)
    lake = Lake(project.settings.lake.root)
    said = lake.read(f"predictions/{case.name}")
    assert {"new", "late_but_here"} <= set(said["from_batch"])
    assert len(said) >= lake.count(f"clean/{case.name}")
    wanted = {"binary": "probability", "multiclass": "probability_Barolo", "regression": "low"}[case.kind]
    assert wanted in said
    if case.name == "heart":
        assert set(lake.read("clean/heart")["thal"].dropna()) == {"normal", "fixed"}
    assert {"contract", "drift", "prediction"} <= set(lake.read(f"monitoring/{case.name}")["check"])


def in_how_to(words: str) -> str:
    "The Python block of the page about an own table that has certain words in it"
    page = nbformat.read(Path(__file__).parent.parent / "nbs/how-to/your_own_table.ipynb", as_version=4)
    blocks = [part.partition("```")[0] for cell in page.cells for part in cell.source.split("```python\n")[1:]]
    (found,) = [one for one in blocks if words in one]
    return found


def test_each_row_of_a_file_gets_an_answer_or_a_reason_and_is_found_again(made, monkeypatch):
    case, project, _, _, env = made
    if case.name != "heart":  # which has copies, and columns that the pipeline leaves out
        return
    given = case.table.head(60).drop(columns="target").astype({"Age": object})
    given = pd.concat([given, given.head(3)], ignore_index=True)
    given.loc[[4, 40], "Age"] = ["unknown", 900]
    given.loc[[10, 11, 12], "thal"] = "severe"
    given.to_csv(project.root / "new.csv", index=False)
    said = " ".join(project.mlpkg("run", "heart_predict", "-p", "source=new.csv", **env).split())
    assert (
        "63 rows of new.csv: 61 predicted, 2 in quarantine; values that the model does not know in thal (3 rows)"
        in said
    )
    step = project.steps(project.pipeline_runs("heart_predict")[0])["predict"]
    assert step.data.metrics["unknown.thal"] == 3
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))
    names: dict = {}
    exec(in_how_to("source_row"), names)  # noqa: S102  (what the page shows, on the file that it names)
    told = names["told"]
    assert told["e-mail"].tolist() == given["e-mail"].tolist()
    assert told["probability"].isna().tolist() == given.index.isin([4, 40]).tolist()
    assert told["reasons"].dropna().to_dict() == {
        4: "age cannot be read; age not null",
        40: told["reasons"][40],
    } and told["reasons"][40].startswith("age at most")
    assert told["probability"].head(3).tolist() == told["probability"].tail(3).tolist()
    assert set(told["source"].dropna()) == {"new.csv"}


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


@contextmanager
def api_of(project: Project, model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, dict]]:
    "The API of a model, and the request that was written for it"
    for name in [name for name in sys.modules if name.partition(".")[0] == "team"]:  # of another project
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(project.root)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    values = {"MLPKG_SERVING__MODEL": model, "MLPKG_SERVING__POLL_SECONDS": "3600"}
    settings = load_settings(file=project.root / "settings.ini", env=values)
    request = json.loads((project.root / f"nbs/pipelines/{model}/request.json").read_text())
    with TestClient(create_app(settings), "http://localhost", client=("127.0.0.1", 1)) as api:
        yield api, request


def test_the_api_answers_raw_rows(made, monkeypatch):
    case, project, _, _, _ = made
    with api_of(project, case.name, monkeypatch) as (api, request):
        answer = api.post("/v1/predict", json=request)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"]) == 2
        if case.name == "sales":  # dates as the file writes them
            record = {**request["records"][0], "made": "01.11.2025"}
            plain = {**record, "made": "2025-11-01"}
            both = api.post("/v1/predict", json={"records": [record, plain]}).json()["predictions"]
            assert both[0] == both[1]
            said = json.dumps(api.get("/openapi.json").json())
            assert "03.11.2026" in said
        if case.name == "heart":  # the file's own codes for what is not known
            record = {**request["records"][0], "cholesterol": -999, "thal": "?"}
            known = {**record, "cholesterol": None, "thal": None}
            both = api.post("/v1/predict", json={"records": [record, known]}).json()["predictions"]
            assert both[0] == both[1]
            spelled = [{**record, "thal": one} for one in ("fixed", " FIXED", "normal")]
            three = api.post("/v1/predict", json={"records": spelled}).json()["predictions"]
            assert three[0] == three[1] != three[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory, stores):
    "A project in which `mlpkg new` has written a pipeline, and nothing was run"
    project = team_project(tmp_path_factory.mktemp("written"), stores)
    table, luck = sales().assign(colour="red"), np.random.default_rng(2).normal(0, 3, 1200)
    table["late"] = np.where(table["weight"] + luck > 10, "yes", "no")
    table.to_csv(project.root / "given.csv", index=False)
    project.mlpkg("new", "sales", "--data", "given.csv", "--target", "late", "--time", "sold")
    return project


def again(project: Project, change, target: str = "late", **asked: str) -> list[str]:
    "What is different about other data, how the recipe would change, and what follows"
    change(pd.read_csv(project.root / "given.csv")).to_csv(project.root / "newer.csv", index=False)
    found_there = find_project(project.root)
    there = read_declared(found_there, "sales")
    made = draft_again(there, "sales", str(project.root / "newer.csv"), target, **asked)
    found = revise(made, there, found_there)
    return [*found.changes, *found.diff.splitlines(), *found.follows]


def lacking(said: list[str], wanted: tuple[str, ...]) -> list[str]:
    "What was to be said, and is not"
    return [words for words in wanted if words not in "\n".join(said)]


def test_once_more_it_writes_nothing_and_shows_how_the_recipe_would_change(written):
    before = {path: path.read_bytes() for path in written.root.rglob("*") if path.suffix in (".ipynb", ".py", ".ini")}
    said = written.mlpkg("new", "sales", "--data", "given.csv", "--target", "late")
    assert "The pipeline sales exists already, and its recipe fits these data" in said
    pd.read_csv(written.root / "given.csv").drop(columns="weight").to_csv(written.root / "newer.csv", index=False)
    said = written.mlpkg("new", "sales", "--data", "newer.csv", "--target", "late")
    wanted = ("exists already, so nothing is written", "- weight is gone", '-numeric: "weight"', "Where you agree")
    assert lacking([said], wanted) == []
    assert {path: path.read_bytes() for path in before} == before


def test_once_more_with_data_that_fit_nothing_would_change(written):
    assert again(written, lambda t: t.sample(900, random_state=0)) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.assign(size=t.index % 50 + 0.5),
         ["size is new: a feature", '+numeric: "size"', '+"size": number_column("Size"',
          "change nbs/api/10_sales.ipynb",
          "tell rows apart"]),
        (lambda t: t.assign(shape="round").drop(columns="colour"),
         ["shape is new, and left out: it has one value (round)", "colour, which was left out, is gone",
          '-left out: "colour"', '+left out: "shape"', "no part of the recipe"]),
        (lambda t: t.assign(colour=t["carrier"].str[:1]),
         ["colour was left out, and is now a feature, texts", '-left out: "colour"', '+categorical: "colour"']),
        (lambda t: t.drop(columns="weight"),
         ["weight is gone", '-numeric: "weight"', '-"weight": number_column(']),
        (lambda t: t.assign(carrier=t["carrier"].map({"red": 1, "blue": 2}).fillna(3)),
         ["carrier held texts, and holds numbers now", '-categorical: "carrier"', '+numeric: "carrier"']),
        (lambda t: t.assign(carrier=[f"p{n}@example.org" for n in range(len(t))]),
         ["carrier identifies people", '-categorical: "carrier"', '-"carrier": text_column(',
          '+left out: "carrier"']),
        (lambda t: t.assign(distance=(t["late"] == "yes") * 1),
         ["distance gives late away", '-numeric: "distance"']),
        (lambda t: t.assign(distance=t["distance"] * 10),
         ["break the rule of distance", '+"distance": number_column("Distance"']),
        (lambda t: t.assign(late=t["late"].where(t.index % 9 > 0, "lost")),
         ["late has a class that is new: 'lost'", '-task = Task("binary", ("no", "yes"))',
          '+task = Task("multiclass", ("no", "yes", "lost"))', "mlpkg new sales_2"]),
        (lambda t: t.assign(late=t["price"]),
         ["late asks another question now: regression", '+task = Task("regression"', "mlpkg new sales_2"]),
    ],
    ids=["new column", "left out", "of use now", "column gone", "kind", "people", "leak", "limits", "class", "number"],
)  # fmt: skip
def test_once_more_with_other_data_it_shows_how_the_recipe_would_change(written, change, wanted):
    assert lacking(again(written, change), wanted) == []


def test_once_more_with_another_split(written):
    said = again(written, lambda t: t, time="made")
    assert lacking(said, ('-time = "sold"', '+time = "made"', "another side", "by hand")) == []
    said = again(written, lambda t: t.assign(shop=t.index % 40), group="shop")
    assert lacking(said, ('+group = "shop"', "another side")) == ["another side"]  # days decide, as before


def test_what_a_person_wrote_into_a_recipe_is_kept(written, tmp_path):
    from shutil import copytree

    project = Project(tmp_path / "own")
    copytree(written.root, project.root)
    page = project.root / "nbs" / "api" / "10_sales.ipynb"
    rule = '\\"Who carries it\\", among=[\\"blue\\", \\"green\\", \\"red\\"], pattern=\\"[a-z]+\\"'
    own = page.read_text().replace('\\"Carrier\\"', rule)
    assert own != page.read_text()
    page.write_text(own)
    assert again(project, lambda t: t) == []
    said = again(project, lambda t: t.assign(carrier=t["carrier"].where(t.index % 5 > 0, "black")))
    assert lacking(said, ('among=["blue", "green", "red", "black"], pattern="[a-z]+"',)) == []


def export(project: Project, *changes: tuple[str, str]) -> None:
    "Change the page of a recipe, and export it"
    page = project.root / "nbs" / "api" / "10_sales.ipynb"
    text = page.read_text()
    for old, new in changes:
        old, new = (json.dumps(one)[1:-1] for one in (old, new))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    page.write_text(text)
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export as export; export()"]
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    subprocess.run(command, cwd=project.root, env=env, check=True)


def test_a_feature_that_is_made_in_clean_is_asked_for_in_the_contract_and_goes_all_the_way(
    written, tmp_path, monkeypatch
):
    from shutil import copytree

    project = Project(tmp_path / "made")
    copytree(written.root, project.root)
    env, etl = {"PYTHONPATH": str(project.root)}, ("run", "sales_etl", "-p", "source=given.csv")
    made = 'return rows.assign(dear=rows["price"] / (rows["weight"] + 1))'
    export(project, ("return rows", made), ("numeric=(", 'numeric=("dear", '))
    said = " ".join(project.mlpkg(*etl, code=1, **env).split())
    line = '"dear": number_column("Dear", made=True),'
    assert "the contract says nothing about dear. A feature that `clean` makes has a column in it too" in said
    assert f"add {line} to the contract" in said
    export(project, ('"weight": number_column', f'{line} "weight": number_column'))
    train = ("sales_train", "-p", 'candidates=["logistic_regression"]', "-p", "budget=0")
    trained = project.mlpkg(*etl, *train, **env)
    table = Lake(project.settings.lake.root).read("clean/sales")
    assert np.allclose(table["dear"], table["price"] / (table["weight"] + 1), equal_nan=True)
    assert again(project, lambda t: t) == []
    if "alias champion" not in trained:
        project.mlpkg("promote", "1", "--model", "sales", "--why", "a test", **env)
    with api_of(project, "sales", monkeypatch) as (api, request):
        records = request["records"]
        without, null = (
            api.post("/v1/predict", json={"records": some})
            for some in (records, [{**one, "dear": None} for one in records])
        )
        assert "dear" not in records[0] and without.status_code == 200, without.text
        assert without.json()["predictions"] == null.json()["predictions"]
        assert "dear" not in json.dumps(api.get("/openapi.json").json()["components"]["schemas"]["Record"]["required"])


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


def test_small_tables_have_their_share_of_a_rare_class_on_each_side_and_rows_stay_there(tmp_path):
    from mlpkg.data.contracts import number_column, text_column

    for seed in range(8):
        rng = np.random.default_rng(seed)
        table = pd.DataFrame(
            {"size": rng.normal(size=240).round(6), "colour": rng.choice(["red", "red", "blue", "blue", "?"], 240)}
        )
        table["outcome"] = np.where(rng.permutation(240) < 24, "rare", "usual")
        table.to_csv(tmp_path / "given.csv", index=False)
        made = draft_pipeline("given", str(tmp_path / "given.csv"), "outcome")
        rules = {"size": number_column("Size"), "colour": text_column("Colour", blanks=["?"])}
        rules["outcome"] = text_column("Outcome", among=["rare", "usual"], nullable=True)
        recipe = Recipe(
            "given", "outcome", made.task, ("size",), ("colour",), lambda rules=rules: pa.DataFrameSchema(rules),
            made.split(),
        )  # fmt: skip
        parts = split_rows(recipe, read_delivery(recipe, str(tmp_path / "given.csv")).rows)
        held = parts[parts["part"] == "holdout"]["outcome"].value_counts()
        assert (abs(held["rare"] - 24 * 0.3) < 1.5, abs(held["usual"] - 216 * 0.3) < 4) == (True, True), held
        more = pd.concat([table, table.assign(size=table["size"] + 1, outcome="rare"), table.head(9)])
        more.to_csv(tmp_path / "given.csv", index=False)
        later = split_rows(recipe, read_delivery(recipe, str(tmp_path / "given.csv")).rows)
        sides = later.drop_duplicates("row").set_index("row")["part"]
        assert sides[parts["row"]].tolist() == parts["part"].tolist()


def visits(name: str, values: list[object]) -> pd.DataFrame:
    "Several rows for each of sixty people, with what does not change about them"
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(60), 5)
    table = pd.DataFrame({name: np.array(values, dtype=object)[who], "size": rng.normal(size=300).round(4)})
    about = {"age": rng.integers(20, 80, 60), "town": rng.choice(list("abcdefghijkl"), 60)}
    table = table.assign(**{key: values[who] for key, values in about.items()}).infer_objects()
    return table.assign(outcome=np.where(table["size"] + rng.normal(size=300) > 0, "yes", "no"))


_given = ["Anna", "Peter", "Maria", "John", "Sarah", "Thomas"]
_family = ["Schmidt", "Miller", "O'Neill", "Lopez", "Brown", "Moreau", "Weber", "Clark", "Young", "Adler"]
_people = [f"{first} {last}" for first in _given for last in _family]


@pytest.mark.parametrize(
    ("name", "values"),
    [("customer", [7919 * one % 9973 for one in range(60)]), ("ref", [f"K-{one:05d}" for one in range(60)])],
)
def test_what_returns_in_several_rows_is_kept_on_one_side(tmp_path, name, values):
    visits(name, values).to_csv(tmp_path / "given.csv", index=False)
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "outcome")
    assert (made.group, made.split().by, made.split().columns) == (name, "group", (name,))
    assert name not in made.found.features("number") + made.found.features("text")
    assert any(words.startswith(f"{name}: names something that returns in about 5 rows") for words in made.notes)
    alone = draft_pipeline("given", str(tmp_path / "given.csv"), "outcome", group="none")
    assert (alone.group, alone.split().by) == ("", "row")


def test_a_split_by_time_says_so_where_both_sides_know_the_same_customers(tmp_path):
    table = visits("customer", [7919 * one % 9973 for one in range(60)])
    when = pd.date_range("2026-01-01", periods=300).strftime("%Y-%m-%d")
    table.assign(when=np.random.default_rng(0).permutation(when)).to_csv(tmp_path / "back.csv", index=False)
    table.assign(when=when).to_csv(tmp_path / "gone.csv", index=False)
    words = "rows that judge are of a customer that training knows"
    for group in ("", "customer"):
        made = draft_pipeline("given", str(tmp_path / "back.csv"), "outcome", "when", group)
        assert made.split().by == "time" and sum(words in one for one in made.warnings) == 1, made.warnings
    for file, days, group in (("back", "when", "none"), ("back", "", ""), ("gone", "when", "")):
        made = draft_pipeline("given", str(tmp_path / f"{file}.csv"), "outcome", days, group)
        assert not any(words in one for one in made.warnings), made.warnings


def test_a_draft_says_that_too_few_rows_of_the_rarer_class_will_judge(tmp_path):
    for rare, expected in ((20, 1), (60, 0)):
        table = pd.DataFrame({"size": np.random.default_rng(0).normal(size=300).round(6)})
        table.assign(outcome=np.where(np.arange(300) < rare, "rare", "usual")).to_csv(
            tmp_path / "given.csv", index=False
        )
        said = draft_pipeline("given", str(tmp_path / "given.csv"), "outcome").warnings
        assert sum("of the rarer class will judge" in one for one in said) == expected, said


def test_names_of_people_are_personal_and_nothing_of_them_is_kept(tmp_path):
    visits("contact", _people).to_csv(tmp_path / "given.csv", index=False)
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "outcome")
    assert "contact: identifies people, left out" in made.notes
    assert "contact" not in made.sample()
    assert any("contact" in words and "numbers in place of names" in words for words in made.warnings)
    towns = [f"New {one}" for one in _family] + [f"{one}ville" for one in _family]
    visits("place", towns * 3).to_csv(tmp_path / "given.csv", index=False)
    assert not any(
        "identifies people" in words for words in draft_pipeline("x", str(tmp_path / "given.csv"), "outcome").notes
    )


def test_rows_that_agree_in_what_does_not_change_are_asked_about(tmp_path):
    visits("batch", [7919 * one % 9973 for one in range(60)]).to_csv(tmp_path / "given.csv", index=False)
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "outcome")
    assert made.group == "" and "batch" in made.found.features("number")
    assert any(
        "rows with the same batch agree in age, town" in words and "--group batch" in words for words in made.warnings
    )


@pytest.mark.parametrize(("positives", "mistakes"), [(0.5, 0.01), (0.5, 0.03), (0.02, 0.001)])
def test_a_column_that_nearly_gives_the_target_away_is_asked_about(positives, mistakes):
    rng = np.random.default_rng(1)
    y = (rng.uniform(size=3000) < positives).astype(int)
    code = np.where(rng.uniform(size=3000) < mistakes, 1 - y, y)
    paid = np.where(code == 1, rng.gamma(3, 100, 3000), 0.0).round(2)
    table = pd.DataFrame(
        {"x": rng.normal(size=3000) + y, "closed_by": np.where(code == 1, "team", "bot"), "paid": paid}
    )
    found = inspect_table(table.assign(y=y), "y")
    said = [one for one in found.warnings if "nearly tells y by itself" in one]
    assert found.columns["paid"].use == "feature" and len(said) == 1, found.warnings
    assert "paid" in said[0] and "closed_by" in said[0] and "x" not in said[0].partition(":")[0].split(", ")


@pytest.mark.parametrize(("noise", "asked"), [(0.06, True), (0.2, False)])
def test_a_number_that_nearly_is_the_number_to_predict_is_asked_about(noise, asked):
    rng = np.random.default_rng(2)
    price = rng.lognormal(8, 0.6, 2000)
    table = pd.DataFrame(
        {"paid": price * (1 + rng.normal(0, noise, 2000)), "size": price**0.3 * rng.lognormal(0, 1, 2000)}
    )
    found = inspect_table(table.assign(price=price), "price")
    said = [one for one in found.warnings if one.startswith("paid: nearly tells price by itself")]
    assert len(said) == asked and found.columns["paid"].use == "feature", found.warnings


def test_classes_that_a_number_nearly_tells_are_asked_about():
    rng = np.random.default_rng(3)
    grade = rng.integers(0, 4, 2000)
    points = 25 * grade + rng.uniform(0, 25, 2000) + rng.normal(0, 0.4, 2000)
    found = inspect_table(pd.DataFrame({"points": points, "age": rng.uniform(size=2000), "grade": grade}), "grade")
    assert [one for one in found.warnings if one.startswith("points: nearly tells grade by itself")], found.warnings


def test_of_many_columns_that_tell_much_a_few_are_named():
    table = load_breast_cancer(as_frame=True).frame
    said = [one for one in inspect_table(table, "target").warnings if "nearly tells" in one]
    assert len(said) == 1 and said[0].partition(":")[0].count(",") <= 2, said


def test_a_target_of_false_and_true_is_two_classes(tmp_path):
    from mlpkg.models.inspection import inspect_table

    late = np.arange(400) % 3 == 0
    found = inspect_table(pd.DataFrame({"weight": np.arange(400) + late * 99.0, "late": late}), "late")
    assert found.task.kind == "binary" and any("two classes (0: 66%, 1: 34%): binary" in one for one in found.notes)
