"""Nothing that is known only after departure may become a feature, and the real year is as the example describes it.

These tests need several whole months and trained models, which would make a page slow.
"""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from mlpkg.data.columns import cast_columns, contract_types
from mlpkg.data.contracts import check, gate
from mlpkg.data.lake import Lake
from mlpkg.examples import flights
from mlpkg.examples.flights_data import read_planes, read_source, read_weather
from mlpkg.settings import load_settings
from mlpkg.steps.run import run_step

year = [f"2013-{month:02d}" for month in range(1, 13)]


@pytest.fixture(scope="module")
def raw():
    return read_source("package", year), read_weather(year), read_planes()


@pytest.fixture(scope="module")
def table(raw):
    return flights.clean(*raw)


def test_features_do_not_depend_on_what_happens_after_departure(raw, table):
    source, weather, planes = raw
    rng = np.random.default_rng(0)
    for change in (rng.permutation, lambda values: np.full(len(values), np.nan)):
        later = source.assign(**{name: change(source[name].to_numpy()) for name in flights.leaks})
        pd.testing.assert_frame_equal(
            flights.clean(later, weather, planes)[flights.flight_features], table[flights.flight_features]
        )


def test_the_clean_table_holds_only_features_keys_and_the_label(table):
    assert not set(flights.flight_features) & {*flights.leaks, "late", "status", "day", "month", "tailnum"}
    assert set(table) == {"month", "day", "flight", "tailnum", "status", "late", *flights.flight_features}


def test_weather_is_that_of_the_scheduled_hour_not_of_the_departure(raw, table):
    source, weather, _ = raw
    joined = source.sort_values(flights.flight_key, ignore_index=True).merge(
        weather[["origin", "month", "day", "hour", "temp"]], on=["origin", "month", "day", "hour"], how="left"
    )
    known = joined["temp"].notna() & table["temp"].notna()
    assert known.mean() > 0.98
    assert (joined["temp"][known] == table["temp"][known]).mean() > 0.999


def scores(table, until, on):
    data = table[table["late"].notna()].astype(dict.fromkeys(flights.categorical, "category"))
    train = data[data["month"] <= until].sample(80_000, random_state=0)
    model = HistGradientBoostingClassifier(categorical_features="from_dtype", random_state=0)
    model.fit(train[flights.flight_features], train["late"])
    parts = {month: data[data["month"] == month] for month in on}
    return {
        m: roc_auc_score(p["late"], model.predict_proba(p[flights.flight_features])[:, 1]) for m, p in parts.items()
    }


def test_a_plain_model_scores_neither_too_low_nor_too_high(table):
    auc = scores(table, "2013-09", ["2013-10", "2013-12"])
    print(auc)
    assert 0.64 < auc["2013-10"] < 0.75, "far more than 0.68 on October means a leak"
    assert 0.67 < auc["2013-12"] < 0.75, "far more than 0.71 on December means a leak"


def test_the_real_year_passes_its_contract_and_its_known_faults_are_found(raw):
    outcome = gate(check(raw[0], flights.flights_contract(), "raw/flights"), 0.05)
    found = outcome.violations.set_index("check")["count"]
    assert found["a delay at arrival exactly if arrived"] == 717
    assert found["slower than 650 mph"] == 2
    assert outcome.rate < 0.01


def test_split_is_by_time(table):
    parts = flights.split(table, "2013-10")
    assert parts.groupby("part")["month"].agg(["min", "max"]).to_dict("index") == {
        "train": {"min": "2013-01", "max": "2013-08"},
        "validation": {"min": "2013-09", "max": "2013-09"},
        "holdout": {"min": "2013-10", "max": "2013-10"},
    }
    days = flights.split(table, "2013-02").assign(date=lambda d: d["month"] + "-" + d["day"].astype(str).str.zfill(2))
    ends = days.groupby("part")["date"].agg(["min", "max"])
    assert ends.loc["train", "max"] < ends.loc["validation", "min"]
    assert ends.loc["validation", "max"] < ends.loc["holdout", "min"]


@pytest.fixture(scope="module")
def split_step():
    "The step notebook as a function of the lake's folder and the months of a delivery"
    nb = json.loads((ROOT / "nbs/pipelines/flights/16_split.ipynb").read_text())
    cells = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    (declared,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    code = "\n".join("".join(c["source"]) for c in cells if "parameters" not in c["metadata"].get("tags", []))

    def run(root: Path, months: str) -> None:
        given = {"months": months} if "months:" in declared else {}  # as the DAG passes what the step declares
        names: dict = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLPKG_LAKE__ROOT", str(root))
            exec(f"{declared}\n{'; '.join(f'{k} = {v!r}' for k, v in given.items())}\n{code}", names)
        plt.close("all")

    return run


def delivered(root: Path, table: pd.DataFrame, deliveries: list[tuple[str, int]], split_step) -> pd.DataFrame:
    "The split after some deliveries; a correction of a month has other flights"
    lake = Lake(root)
    for month, correction in deliveries:
        rows = table[table["month"] == month].iloc[correction * 20 :: 150]
        lake.write("clean/flights", rows, mode="replace", partition={"month": month})
        split_step(root, month)
    return lake.read("split/flights")


spring = ["2013-01", "2013-02", "2013-03", "2013-04", "2013-05"]


@settings(max_examples=12, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(spring), st.integers(0, 2)), min_size=1, max_size=7))
@example([("2013-01", 0), ("2013-02", 0), ("2013-03", 0), ("2013-04", 0), ("2013-05", 0), ("2013-02", 1)])
def test_the_split_does_not_depend_on_the_order_of_deliveries(split_step, table, tmp_path_factory, deliveries):
    found = delivered(tmp_path_factory.mktemp("any"), table, deliveries, split_step)
    in_order = delivered(tmp_path_factory.mktemp("sorted"), table, sorted(dict(deliveries).items()), split_step)
    pd.testing.assert_frame_equal(found, in_order)
    last = max(month for month, _ in deliveries)
    assert found["month"].max() == last and set(found.loc[found["month"] == last, "part"]) >= {"holdout"}


def test_what_is_too_little_to_split_is_said_in_words(table):
    with pytest.raises(flights.FlightsError, match="no flights with a label: "):
        flights.split(table[table["status"] != "arrived"])
    with pytest.raises(flights.FlightsError, match="no flights with a label up to 2012-12: "):
        flights.split(table, "2012-12")
    with pytest.raises(flights.FlightsError, match=r"only 1 day with flights \(2013-01-01\)"):
        flights.split(table[(table["month"] == "2013-01") & (table["day"] == 1)])
    with pytest.raises(flights.FlightsError, match=r"only 2 days with flights \(2013-01-01, 2013-01-02\)"):
        flights.split(table[(table["month"] == "2013-01") & (table["day"] <= 2)])


def test_seeding_is_deterministic_and_may_be_repeated(tmp_path):
    first, second = flights.seed_lake(Lake(tmp_path / "a")), flights.seed_lake(Lake(tmp_path / "b"))
    flights.seed_lake(second)
    assert first.tables() == ["clean/flights", "raw/flights", "raw/planes", "raw/weather", "split/flights"]
    for name in ("clean/flights", "split/flights"):
        order = ["month", "day", "sched_hour", "sched_minute", *flights.categorical, "distance", "plane_age", "late"]
        one, other = (lake.read(name).sort_values(order, ignore_index=True) for lake in (first, second))
        pd.testing.assert_frame_equal(one, other)


def test_a_file_from_the_web_waits_where_the_lake_spills(project, tmp_path, raw):
    site, settings = tmp_path / "site", project.root / "settings.ini"
    site.mkdir()
    raw[0][raw[0]["month"] == "2013-01"].assign(month=1).head(300).to_csv(site / "flights.csv", index=False)
    kept = [line for line in settings.read_text().splitlines() if not line.startswith("lake.spill")]
    settings.write_text("\n".join([*kept, "lake.spill = var/spill", ""]))
    notebook = shutil.copy(ROOT / "nbs" / "pipelines" / "flights" / "10_ingest.ipynb", project.root / "notebooks")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = {"source": f"http://127.0.0.1:{server.server_port}/flights.csv", "months": "2013-01"}
        assert run_step(notebook, source, settings=project.settings).scraps["rows"] == 300
        server.shutdown()
    assert (project.root / "var" / "spill").is_dir() and not list((project.root / "var" / "spill").iterdir())


def test_the_seeded_store_spills_where_the_settings_say(project, monkeypatch):
    seen = []
    monkeypatch.setattr("mlpkg.steps.tracking.connect", lambda settings: None)
    monkeypatch.setattr(flights, "seed_lake", lambda lake, *args, **kwargs: seen.append(lake.spill) or 1 / 0)
    settings = load_settings(file=project.root / "settings.ini", env={"MLPKG_LAKE__SPILL": str(project.root / "spill")})
    with pytest.raises(ZeroDivisionError):
        flights.seed_store(settings)
    assert seen == [str(project.root / "spill")]


def test_the_request_that_readme_shows_is_there_and_fits_the_contract():
    text = (ROOT / "nbs/pipelines/flights/request.json").read_text()
    assert text in (ROOT / "README.md").read_text()
    records = cast_columns(pd.DataFrame(json.loads(text)["records"]), contract_types(flights.features_contract()), "it")
    assert sorted(records) == sorted(flights.flight_features)
    assert check(records, flights.features_contract()).bad_rows == 0
