"""What a page cannot show of batch prediction: memory use, and failures half way that leave nothing behind.

Other tests show, for every kind of model and file, that probabilities are the same wherever rows come from.
"""

import datetime as dt
import gc
import gzip
import json
import os
import subprocess
import sys
import warnings
import zipfile
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path

import deltalake
import numpy as np
import pandas as pd
import pandera.pandas as schemas
import pyarrow as pa
import pytest
from deltalake.exceptions import CommitFailedError
from pyarrow.csv import CSVWriter
from pydantic import TypeAdapter, ValidationError
from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

from mlpkg.batch.origins import Claim
from mlpkg.batch.predict import predict_batches, score
from mlpkg.batch.screening import BatchError, Screened, fast_check, rows_as_json, screen
from mlpkg.batch.summary import plot_result
from mlpkg.data.arrow import LakeError
from mlpkg.data.commits import OutdatedError
from mlpkg.data.contracts import check, time_column
from mlpkg.data.inputs import Input, as_contract, from_json, inputs_from, shape, to_json
from mlpkg.data.lake import Lake
from mlpkg.data.sources import SourceError
from mlpkg.data.together import replace_together
from mlpkg.models import scoring
from mlpkg.models.candidates import candidates
from mlpkg.models.registry import Loaded, RegistryError, load_model, register
from mlpkg.models.scoring import Scorer, probability
from mlpkg.models.storage import log_model
from mlpkg.models.training import fit
from mlpkg.serving.schemas import field_type
from mlpkg.testing import temporary_store

NUMERIC, CATEGORICAL = ["distance", "weight"], ["carrier", "depot"]
FEATURES = NUMERIC + CATEGORICAL
MONTHS = ["2026-01", "2026-02"]
TABLE, TO, ASIDE = "clean/parcels", "predictions/parcels", "quarantine/predictions/parcels"

CONTRACT = schemas.DataFrameSchema(
    {
        "distance": schemas.Column(float, schemas.Check.in_range(0, 900)),
        "weight": schemas.Column(float, schemas.Check.ge(0), nullable=True),
        "carrier": schemas.Column(str, nullable=True),  # open: other values become missing
        "depot": schemas.Column(str, schemas.Check.isin(["NA", "EU", "AS"], error="a depot")),  # closed
    }
)


@pytest.fixture(scope="module")
def parcels() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 2000
    return pd.DataFrame(
        {
            "month": np.repeat(MONTHS, n // 2),
            "parcel": range(n),
            "distance": rng.uniform(5, 900, n),
            "weight": np.where(rng.uniform(size=n) < 0.2, np.nan, rng.gamma(2, 3, n)),
            "carrier": rng.choice(["blue", "red", "007", None], n, p=[0.4, 0.4, 0.1, 0.1]),
            "depot": rng.choice(["NA", "EU", "AS"], n),
        }
    )


@pytest.fixture(scope="module")
def models(parcels) -> dict[str, Loaded]:
    late = (np.random.default_rng(1).uniform(size=len(parcels)) < 1 / (1 + np.exp(2 - parcels["distance"] / 300))) * 1
    known = parcels.assign(late=late)
    inputs = inputs_from(CONTRACT, parcels, FEATURES)
    return {name: Loaded(fit(name, known, "late", NUMERIC, CATEGORICAL), None, {}, inputs) for name in candidates}


@pytest.fixture(scope="module")
def loaded(models) -> Loaded:
    return models["hist_gradient_boosting"]


@pytest.fixture
def lake(tmp_path, parcels) -> Lake:
    lake = Lake(tmp_path / "lake", spill=tmp_path / "spill")
    lake.write(TABLE, parcels, mode="replace", partition={"month": MONTHS})
    return lake


def predictions(lake: Lake) -> pd.DataFrame:
    return lake.read(TO)[["month", "parcel", "prediction", "probability"]].sort_values("parcel", ignore_index=True)


def spilled(folder: Path) -> list[str]:
    "Files in the spill folder, including deleted ones that are still open"
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")]
    return [*map(str, folder.iterdir()), *(name for name in opened if name.startswith(f"{folder}/"))]


def state(lake: Lake) -> dict[str, int]:
    "Tables and their versions"
    return {name: lake.version(name) for name in lake.tables()}


@pytest.mark.parametrize("name", sorted(candidates))
def test_probabilities_equal_those_of_training_to_the_last_digit(name, models, lake, parcels):
    odd = parcels.assign(carrier=parcels["carrier"].where(parcels.index % 7 > 0, "never seen"))
    lake.write(TABLE, odd, mode="replace", partition={"month": MONTHS})
    done = score(lake, models[name], TABLE, TO, {"month": MONTHS}, ["parcel"], rows=300)
    expected = probability(models[name].pipeline, odd[FEATURES])
    found = predictions(lake)
    if name == "logistic_regression":  # a sum over columns: its order, and so its last digit, depends on the batch
        np.testing.assert_allclose(found["probability"], expected, rtol=1e-13)
    else:
        np.testing.assert_array_equal(found["probability"], expected)
    np.testing.assert_array_equal(found["prediction"], found["probability"] >= 0.5)
    assert (done.rows, done.predicted, done.quarantined) == (2000, 2000, 0)
    assert done.means["mean_probability"] == pytest.approx(expected.mean(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(candidates))
def test_batch_records_and_notebook_give_the_same_bits(name, models, lake, parcels):
    odd = parcels.assign(carrier=parcels["carrier"].where(parcels.index % 7 > 0, "never seen"))
    lake.write(TABLE, odd, mode="replace", partition={"month": MONTHS})
    score(lake, models[name], TABLE, TO, {"month": MONTHS}, ["parcel"], rows=20_000)  # all rows at once
    scorer = Scorer(models[name].pipeline, models[name].inputs)
    records = [{key: None if pd.isna(value) else value for key, value in row.items()} for row in odd.to_dict("records")]
    expected = probability(models[name].pipeline, odd[FEATURES])
    assert scorer.fast
    np.testing.assert_array_equal(scorer.records(records), expected)
    np.testing.assert_array_equal(predictions(lake)["probability"], expected)
    for one in range(0, 2000, 97):
        alone = odd[FEATURES].iloc[[one]]
        np.testing.assert_array_equal(scorer.records([records[one]]), probability(models[name].pipeline, alone))


def by_batch(table) -> np.ndarray:
    "Each number minus the mean of its batch"
    return (table - np.nanmean(np.asarray(table), axis=0)).astype(float)


@pytest.mark.parametrize("numbers", [by_batch, lambda table: table.rank().to_numpy()])
def test_a_scorer_leaves_transforms_that_depend_on_the_batch_to_scikit_learn(numbers, loaded, parcels, caplog):
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    columns = ColumnTransformer([("numbers", FunctionTransformer(numbers), NUMERIC)])
    pipeline = Pipeline([("columns", columns), ("model", HistGradientBoostingClassifier(max_iter=5))])
    pipeline.fit(parcels[NUMERIC], parcels["parcel"] % 2)
    scorer = Scorer(pipeline, loaded.inputs)
    assert scorer.way == "plain" and "does not encode as scikit-learn does" in caplog.text
    assert Scorer(pipeline, loaded.inputs, tables_only=True).way == "plain"
    records = parcels[FEATURES].head(5).to_dict("records")
    np.testing.assert_array_equal(scorer.records(records), probability(pipeline, parcels.head(5)))
    np.testing.assert_array_equal(scorer.frame(parcels[FEATURES]), probability(pipeline, parcels))


def test_files_and_tables_give_the_same(loaded, lake, parcels, tmp_path):
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    expected = predictions(lake)
    parcels.to_csv(tmp_path / "p.csv", index=False)
    with zipfile.ZipFile(tmp_path / "p.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "p.csv", "p.csv")
        archive.writestr("read.me", "not a table")
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress((tmp_path / "p.csv").read_bytes()))
    parcels.to_parquet(tmp_path / "p.parquet")
    other = parcels.astype({"carrier": "category", "month": "category", "parcel": "int32", "weight": "Float64"})
    other.iloc[::-1].to_parquet(tmp_path / "other.parquet")  # in another order, in other types
    for name in ("p.csv", "p.csv.zip", "p.csv.gz", "p.parquet", "other.parquet"):
        done = score(lake, loaded, str(tmp_path / name), TO, {"month": MONTHS}, ["parcel"], rows=300)
        pd.testing.assert_frame_equal(predictions(lake), expected)
        stored = lake.read(TO)
        assert set(stored["source"]) == {str(tmp_path / name)} and set(stored["source_version"]) == {-1}
        assert done.tables == {TO: lake.version(TO)} and done.quarantined == 0


def places(lake: Lake) -> pd.DataFrame:
    "Where each row of a source is now, in the order of the source"
    names, columns = [TO, ASIDE], ["parcel", "source", "source_row"]
    return pd.concat([lake.read(name)[columns].assign(table=name) for name in names]).sort_values(
        "source_row", ignore_index=True
    )


@pytest.mark.parametrize("name", ["p.csv", "p.csv.gz", "p.parquet"])
def test_each_row_of_a_file_is_found_by_its_place_there(name, loaded, lake, parcels, tmp_path):
    mixed = parcels.sample(frac=1, random_state=0, ignore_index=True)  # months are mixed too
    mixed = pd.concat([mixed, mixed.head(7)], ignore_index=True)  # copies are rows as well
    mixed["distance"] = mixed["distance"].mask(mixed.index % 50 == 0, -1.0)
    path = str(tmp_path / name)
    mixed.to_parquet(path) if name.endswith("parquet") else mixed.to_csv(path, index=False)
    done = score(lake, loaded, path, TO, {"month": MONTHS[1]}, ["parcel"], rows=300)
    asked = mixed[mixed["month"] == MONTHS[1]]
    found = places(lake)
    assert (done.rows, done.predicted + done.quarantined) == (len(asked), len(asked)) == (len(found),) * 2
    assert found["source_row"].tolist() == [place + 1 for place in asked.index]  # from 1 on, below the header
    assert found["parcel"].tolist() == asked["parcel"].tolist()
    assert (found["table"] == ASIDE).tolist() == (asked["distance"] < 0).tolist()
    assert set(found["source"]) == {path}


def test_a_row_of_a_table_has_no_place_in_a_file(loaded, lake):
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    assert lake.read(TO)["source_row"].isna().all()


def test_tables_that_do_not_know_the_place_in_a_file_gain_it(loaded, lake, parcels, tmp_path):
    odd = parcels.assign(distance=parcels["distance"].mask(parcels["parcel"].isin([3, 1500]), -1.0))
    lake.write(TABLE, odd, mode="replace", partition={"month": MONTHS})
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    for name in (TO, ASIDE):  # as an earlier version has left them
        lake.write(name, lake.read(name).drop(columns="source_row"), mode="overwrite", change_schema=True)
    odd[odd["month"] == MONTHS[1]].to_csv(tmp_path / "p.csv", index=False)
    score(lake, loaded, str(tmp_path / "p.csv"), TO, {"month": MONTHS[1]}, ["parcel"])
    for name, known, all_rows in ((TO, 999, 1998), (ASIDE, 1, 2)):
        assert lake.read(name)["source_row"].agg(["count", "size"]).tolist() == [known, all_rows]
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    assert lake.read(TO)["source_row"].isna().all() and lake.count(ASIDE) == 2


TIMES = {  # Text -> what it means where nothing, day first and month first is declared; None: it is refused
    "2018-11-01": ("2018-11-01",) * 3,
    "2018-11-01T10:00:00+01:00": ("2018-11-01T09:00:00",) * 3,
    "2018-11-01 10:00": ("2018-11-01T10:00:00",) * 3,
    "1 Nov 2018": ("2018-11-01",) * 3,
    "2018-11": ("2018-11-01",) * 3,
    "01.11.2018": (None, "2018-11-01", "2018-01-11"),
    "1/11/2018 10:30": (None, "2018-11-01T10:30:00", "2018-01-11T10:30:00"),
    "13.11.2018": ("2018-11-13", "2018-11-13", None),
    "11/13/2018": ("2018-11-13", None, "2018-11-13"),
    "now": (None,) * 3,
    "10:00": (None,) * 3,
    "2018-13-01": (None,) * 3,
    "1 Nov 2018" + " " * 9999 + "x": (None,) * 3,
}


@pytest.mark.parametrize("place, day_first", enumerate((None, True, False)))
@pytest.mark.parametrize("text", TIMES)
def test_a_time_means_the_same_in_a_file_and_in_a_request(text, place, day_first):
    one = inputs_from(
        schemas.DataFrameSchema({"sent": time_column("Sent", day_first=day_first)}),
        pd.DataFrame({"sent": pd.to_datetime(["2018-01-01"], utc=True)}), ["sent"],
    )  # fmt: skip
    inputs, request = from_json({"sent": "double"}, to_json(one)), TypeAdapter(field_type(one[0]))
    try:
        table = screen(pa.record_batch({"sent": [text]}), inputs, as_contract(inputs)).table
        batch = table["sent"].iloc[0] if len(table) else None
    except BatchError:
        batch = None
    try:
        asked = request.validate_python(text)
    except ValidationError as error:
        asked = None
        assert "like 2026-11-03T10:00:00Z" in str(error)
    wanted = TIMES[text][place]
    expected = None if wanted is None else (pd.Timestamp(wanted) - pd.Timestamp(0)) / pd.Timedelta(days=1)
    assert (batch, asked) == (expected, expected)
    said = request.json_schema()["description"]
    assert {None: "one meaning", True: "03.11.2026", False: "11/03/2026"}[day_first] in said


def test_a_month_predicted_twice_is_there_once_and_others_are_left_alone(loaded, lake):
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    before = lake.read(TO)
    score(lake, loaded, TABLE, TO, {"month": "2026-02"}, ["parcel"], threshold=0.2)
    after = lake.read(TO)
    assert len(after) == len(before) == 2000 and not after.duplicated(["month", "parcel"]).any()
    first = [table[table["month"] == "2026-01"].reset_index(drop=True) for table in (before, after)]
    pd.testing.assert_frame_equal(*first)
    second = after[after["month"] == "2026-02"]
    assert (second["prediction"] == (second["probability"] >= 0.2)).all()
    assert second["predicted_at"].min() > before["predicted_at"].max()


def test_a_cleared_prediction_of_an_old_dag_run_does_not_replace_newer_ones(loaded, lake, parcels):
    early, late = (Lake(lake.root, spill=lake.spill, run=run) for run in ("ab12", "cd34"))
    month = {"month": MONTHS[0]}
    score(early, loaded, TABLE, TO, month, ["parcel"])
    lake.write(TABLE, parcels.assign(distance=7.0), mode="replace", partition={"month": MONTHS})
    score(late, loaded, TABLE, TO, month, ["parcel"])
    newer = lake.version(TO)
    with pytest.raises(OutdatedError, match=f"was made from version 1 of '{TABLE}' meanwhile"):
        score(early, loaded, TABLE, TO, month, ["parcel"])
    score(early, loaded, TABLE, TO, {"month": MONTHS[1]}, ["parcel"])
    assert lake.version(TO) == newer + 1


def test_bad_rows_go_to_quarantine_with_reasons_and_leave_it_when_they_are_fixed(loaded, lake, parcels):
    bad = parcels.assign(
        distance=parcels["distance"].mask(parcels.index == 3, 5000.0).mask(parcels.index == 1500, np.nan),
        weight=parcels["weight"].mask(parcels.index == 4, np.inf),
        depot=parcels["depot"].mask(parcels.index.isin([3, 5]), "MARS"),
    )
    lake.write(TABLE, bad, mode="replace", partition={"month": MONTHS})
    done = score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"], rows=300)
    assert (done.rows, done.predicted, done.quarantined) == (2000, 1996, 4)
    aside = lake.read(ASIDE).set_index("parcel").sort_index()
    assert aside["reasons"].to_dict() == {
        3: "distance at most 900; depot one of AS, EU, NA",
        4: "weight finite",
        5: "depot one of AS, EU, NA",
        1500: "distance not null",
    }
    assert aside.loc[4, "inputs"].startswith('{"distance": ') and '"weight": "inf"' in aside.loc[4, "inputs"]
    assert '"distance": null' in aside.loc[1500, "inputs"]
    assert not set(aside.index) & set(predictions(lake)["parcel"])
    assert done.outcome.violations.set_index("check")["count"].to_dict()["one of AS, EU, NA"] == 2
    score(lake, loaded, TABLE, TO, {"month": "2026-01"}, ["parcel"])
    assert lake.count(ASIDE) == 4
    lake.write(TABLE, parcels[:1000], mode="replace", partition={"month": "2026-01"})
    done = score(lake, loaded, TABLE, TO, {"month": "2026-01"}, ["parcel"])
    assert done.tables[ASIDE] == lake.version(ASIDE) and done.quarantined == 0
    assert lake.read(ASIDE)["parcel"].tolist() == [1500] and lake.count(TO) == 1999


def test_predictions_of_another_source_that_came_meanwhile_are_not_replaced(loaded, lake, parcels, tmp_path):
    "Two runs at once, neither of which may replace predictions of the other"
    parcels[:100].to_parquet(tmp_path / "desk.parquet")
    elsewhere, month = Lake(tmp_path / "elsewhere"), {"month": "2026-01"}
    score(elsewhere, loaded, str(tmp_path / "desk.parquet"), TO, month, ["parcel"])
    theirs, seen = elsewhere.table(TO), []

    def meanwhile(found):  # the other run commits when this one has looked, and has its rows
        seen.append(len(found))
        if len(seen) == 2:
            replace_together(lake, {TO: theirs}, month)
        return {one for one in found if one[1] == TABLE}

    with pytest.raises(BatchError, match="month '2026-01' was predicted from .*desk.parquet"):
        score(lake, loaded, TABLE, TO, month, ["parcel"], replace=Claim("month", ["2026-01"], TABLE, meanwhile))
    assert seen == [0, 0, 1] and set(lake.read(TO)["source"]) == set(elsewhere.read(TO)["source"])


@pytest.mark.parametrize("depot", ["AS", "EU"])
def test_only_predictions_of_the_same_rows_that_came_meanwhile_count(loaded, lake, parcels, tmp_path, depot):
    "Predictions by month and depot: those of another depot stay beside ours"
    parcels[:100].to_parquet(tmp_path / "desk.parquet")
    elsewhere, seen = Lake(tmp_path / "elsewhere"), []
    part, ours = {"month": "2026-01", "depot": depot}, {"month": "2026-01", "depot": "EU"}
    score(elsewhere, loaded, str(tmp_path / "desk.parquet"), TO, part, ["parcel"])
    theirs = elsewhere.table(TO)

    def meanwhile(found):
        seen.append(len(found))
        if len(seen) == 2:
            replace_together(lake, {TO: theirs}, part)
        return {one for one in found if one[1] == TABLE}

    with nullcontext() if depot == "AS" else pytest.raises(BatchError, match="'2026-01' was predicted from .*desk"):
        score(lake, loaded, TABLE, TO, ours, ["parcel"], replace=Claim("month", ["2026-01"], TABLE, meanwhile))
    assert seen == [0, 0, depot == "EU"]
    ours_too = depot == "AS" and sum(parcels["depot"].eq("EU") & parcels["month"].eq("2026-01"))
    assert lake.count(TO) == theirs.num_rows + ours_too


@pytest.mark.parametrize("claim", [Claim("day", ["2026-01-01"], TABLE), Claim("month", ["2026-02"], TABLE)])
def test_a_claim_of_something_else_than_is_written_replaces_nothing(loaded, lake, parcels, tmp_path, claim):
    parcels[:100].to_parquet(tmp_path / "desk.parquet")
    month = {"month": "2026-01"}
    score(lake, loaded, str(tmp_path / "desk.parquet"), TO, month, ["parcel"])
    with pytest.raises(BatchError, match="claims? .*'day'|was predicted from .*desk.parquet"):
        score(lake, loaded, TABLE, TO, month, ["parcel"], replace=claim)
    assert lake.version(TO) == 0


def test_a_month_without_a_single_good_row(loaded, lake, parcels):
    lake.write(TABLE, parcels.assign(distance=-1.0), mode="replace", partition={"month": MONTHS})
    done = score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"], by=["depot"], rows=300)
    assert (done.predicted, done.quarantined, lake.count(TO), lake.count(ASIDE)) == (0, 2000, 0, 2000)
    assert (
        np.isnan(done.means["positive_rate"])
        and done.groups["rows"].sum() == 0
        and done.groups["quarantined"].sum() == 4000
    )
    plot_result(done)
    assert len(done.outcome.bad) == 20


def test_text_in_a_csv_is_taken_literally(loaded, lake, tmp_path):
    header = "month,parcel,distance,weight,carrier,depot\n"
    (tmp_path / "p.csv").write_text(header + "2026-01,1,10,NA,,NA\n2026-01,2,10.5,,007,EU\n2026-01,3,7,nan,NA,\n")
    done = score(lake, loaded, str(tmp_path / "p.csv"), TO, {"month": "2026-01"}, ["parcel"])
    rows = pd.DataFrame({"distance": [10, 10.5], "weight": np.nan, "carrier": [None, "007"], "depot": ["NA", "EU"]})
    np.testing.assert_array_equal(predictions(lake)["probability"], probability(loaded.pipeline, rows))
    assert done.quarantined == 1 and lake.read(ASIDE)["reasons"].tolist() == ["depot not null"]


def test_other_models_and_other_columns(lake, parcels):
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline

    known = parcels[NUMERIC]
    alone = Pipeline([("model", HistGradientBoostingClassifier(max_iter=5).fit(known, parcels["parcel"] % 2))])
    inputs = [Input("distance", "number"), Input("weight", "number")]
    done = score(
        lake, Loaded(alone, None, {}, inputs), TABLE, TO, {"month": MONTHS}, by=["carrier", "weight"], rows=300
    )
    assert done.predicted == 2000 and sorted(lake.read(TO).columns)[0] == "model"
    gaps = done.groups[(done.groups["column"] == "weight") & done.groups["value"].isna()]
    assert gaps["rows"].tolist() == [parcels["weight"].isna().sum()]
    with pytest.raises(BatchError, match="does not say what it takes"):
        score(lake, Loaded(alone, None, {}, []), TABLE, TO, {"month": MONTHS})


def by_length(table: pd.DataFrame) -> np.ndarray:
    return table.apply(lambda column: column.str.len()).to_numpy(float)


def by_rank(table: pd.DataFrame) -> np.ndarray:
    return pd.DataFrame(table).rank(method="first").to_numpy()


def by_depot(table: pd.DataFrame) -> np.ndarray:
    return (table[["depot"]] == "EU").to_numpy(float)


@pytest.mark.parametrize("texts, way", [(by_length, "frames"), (by_depot, "frames"), (by_rank, "plain")])
def test_text_columns_are_encoded_once_per_combination_where_the_result_is_the_same(texts, way, loaded, parcels):
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    called = []
    count = FunctionTransformer(lambda table: called.append(len(table)) or texts(table))
    blocks = [("w", "drop", ["weight"]), ("n", "passthrough", ["distance"]), ("t", count, CATEGORICAL)]
    pipeline = Pipeline([("c", ColumnTransformer(blocks)), ("m", HistGradientBoostingClassifier(max_iter=5))])
    table = shape(parcels[FEATURES], loaded.inputs)
    pipeline.fit(table, parcels["parcel"] % 2)
    scorer = Scorer(pipeline, loaded.inputs)
    assert (scorer.way, scorer.fast) == (way, False)
    for part in (table[:500], table[500:]):
        np.testing.assert_array_equal(scorer.encode(part), pipeline[:-1].transform(part))
        np.testing.assert_array_equal(scorer.frame(part), probability(pipeline, part))
    seen = len(table[500:][CATEGORICAL].drop_duplicates())
    fast = 1500 if way == "plain" else seen
    assert called[-4:] == [fast, 1500, fast, 1500]


def test_a_column_that_may_be_missing_may_be_absent(loaded, lake, parcels, tmp_path):
    parcels.drop(columns="weight").to_csv(tmp_path / "p.csv", index=False)
    done = score(lake, loaded, str(tmp_path / "p.csv"), TO, {"month": MONTHS}, ["parcel"])
    assert done.absent == ["weight"]
    expected = probability(loaded.pipeline, parcels.assign(weight=np.nan)[FEATURES])
    np.testing.assert_array_equal(predictions(lake)["probability"], expected)


def broken_files(parcels: pd.DataFrame, folder: Path) -> dict[str, str]:
    "Files that cannot be scored, and what the error about each must say"
    tables = {
        "short.csv": (parcels.drop(columns=["distance", "depot"]), "column 'distance'; missing column 'depot'"),
        "month.csv": (parcels.drop(columns="month"), "has no column 'month', which would say of each row which"),
        "key.csv": (parcels.drop(columns="parcel"), "missing column 'parcel'"),
        "text.csv": (parcels.assign(distance="far"), "column 'distance' should hold numbers"),
        "text.parquet": (parcels.assign(distance="far"), "column 'distance' should hold numbers"),
        "number.parquet": (parcels.assign(carrier=7), "column 'carrier' is int64, the model takes text"),
        "date.parquet": (parcels.assign(weight=pd.Timestamp("2026-01-01")), "is timestamp[us], the model takes number"),
        "rowless.csv": (parcels.head(0), "has no rows for month 2026-01, month 2026-02"),
        "january.csv": (parcels.head(1000), "has no rows for month 2026-02"),
        "integers.parquet": (parcels.assign(month=1), "column 'month' is int64, so it cannot be '2026-01'"),
        "keys.csv": (parcels.assign(parcel="P"), "conversion error to int64: invalid value 'P'"),
    }
    for name, (table, _) in tables.items():
        table.to_csv(folder / name, index=False) if name.endswith("csv") else table.to_parquet(folder / name)
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        archive.writestr("a.csv", "x\n1\n")
        archive.writestr("b.csv", "x\n1\n")
    torn = {"empty.csv": b"", "torn.gz": gzip.compress(b"x\n" * 99)[:20], "no.zip": b"x", "no.parquet": b""}
    for name, content in torn.items():
        (folder / name).write_bytes(content)
    return {str(folder / name): message for name, (_, message) in tables.items()} | {
        str(folder / "two.zip"): "holds 2 CSV files",
        str(folder / "empty.csv"): "it is empty",
        **{
            str(folder / name): f"{name}' cannot be read" for name in ("torn.gz", "no.zip", "no.parquet", "nowhere.csv")
        },
        str(folder): "that ends in .csv",
        "ftp://example.org/parcels.csv": "give a table of the lake",
        "clean/letters": "no table 'clean/letters'",
    }


def test_a_source_that_cannot_be_scored_raises_a_clear_error_and_nothing_is_written(loaded, lake, parcels, tmp_path):
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    before = state(lake)
    for source, message in broken_files(parcels, tmp_path).items():
        with pytest.raises((BatchError, SourceError, LakeError)) as error:
            score(lake, loaded, source, TO, {"month": MONTHS}, ["parcel"])
        assert message in str(error.value), f"{source}: {error.value}"
        assert "Traceback" not in str(error.value)
        assert state(lake) == before, source
    for kwargs, message in (
        ({"threshold": 2}, "from 0 to 1"),
        ({"partition": {}}, "which rows?"),
        ({"to": "No Table"}, "is not a table name"),
        ({"keep": ["sender"]}, "missing column 'sender'"),
        ({"by": ["sender"]}, "missing column 'sender'"),
        ({"keep": ["parcel", "depot"]}, "unknown column 'depot'"),
        ({"partition": {"month": "2026-07"}}, "has no rows for month 2026-07"),
    ):
        given = {"to": TO, "partition": {"month": MONTHS}, "keep": ["parcel"], **kwargs}
        with pytest.raises((BatchError, SourceError, LakeError), match=message.replace("?", r"\?")):
            score(lake, loaded, TABLE, **given)
        assert state(lake) == before
    assert spilled(lake.spill) == []


class Failing:
    "A model that fails after a number of batches"

    def __init__(self, model, after: int):
        self.model, self.after = model, after

    def predict_proba(self, X):
        self.after -= 1
        if self.after < 0:
            raise MemoryError("no more")
        return self.model.predict_proba(X)


def with_model(loaded: Loaded, model) -> Loaded:
    from sklearn.pipeline import Pipeline

    return Loaded(Pipeline([("columns", loaded.pipeline[0]), ("model", model)]), None, {}, loaded.inputs)


def test_a_failure_half_way_writes_nothing_and_leaves_the_process_as_it_was(loaded, lake):
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    before = state(lake)

    def process():
        return sys.getswitchinterval(), [pool["num_threads"] for pool in threadpool_info()], list(warnings.filters)

    as_it_was = process()
    for after in (0, 3, 6):
        with pytest.raises(MemoryError, match="no more"):
            score(
                lake,
                with_model(loaded, Failing(loaded.pipeline[-1], after)),
                TABLE,
                TO,
                {"month": MONTHS},
                ["parcel"],
                rows=300,
            )
        assert state(lake) == before
    assert process() == as_it_was
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    assert process() == as_it_was


def test_native_threads_are_limited_and_restored_even_in_a_library_that_the_model_loads(loaded, lake, monkeypatch):
    with monkeypatch.context() as patch:  # searched before the library was loaded
        patch.setattr(scoring, "ThreadpoolController", lambda: ThreadpoolController().select(user_api="openmp"))
        scoring._pools.cache_clear()
        scoring._pools()
    during, model = [], loaded.pipeline[-1]

    class Watched:
        def predict_proba(self, X):
            during.extend(pool["num_threads"] for pool in threadpool_info())
            return model.predict_proba(X)

    with threadpool_limits(2):
        before = [pool["num_threads"] for pool in threadpool_info()]
        list(predict_batches(with_model(loaded, Watched()), lake.batches(TABLE), rows=300, threads=2))
        assert [pool["num_threads"] for pool in threadpool_info()] == before
    assert set(during) == {1}


def test_memory_is_freed_batch_by_batch_up_to_the_last_one(loaded, lake):
    before = [one for one in gc.get_objects() if isinstance(one, Screened)]  # what other tests still hold
    left = [
        sum(isinstance(one, Screened) for one in gc.get_objects()) - len(before)
        for _ in predict_batches(loaded, lake.batches(TABLE), rows=300, threads=4)
    ]
    assert max(left) > 4 and left[-1] == 1


def test_a_quarantine_that_does_not_fit_is_found_before_anything_is_written(loaded, lake, parcels):
    lake.write(
        ASIDE,
        pd.DataFrame({"month": ["2026-01"], "parcel": [1], "why": ["?"]}),
        mode="replace",
        partition={"month": "2026-01"},
    )
    before = state(lake)
    with pytest.raises(LakeError, match="unknown column 'reasons'"):
        score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    assert state(lake) == before


def test_a_refused_commit_is_tried_again_without_scoring_again(loaded, lake, monkeypatch):
    commits, commit, model = [], Lake._commit, Failing(loaded.pipeline[-1], 10**9)

    def refused_once(self, name, reader, *args, **more):
        commits.append(name)
        if len(commits) == 1:
            reader.read_next_batch()
            assert spilled(lake.spill), "the predictions are copied while they are written"
            raise CommitFailedError("somebody was faster")
        commit(self, name, reader, *args, **more)

    monkeypatch.setattr(Lake, "_commit", refused_once)
    done = score(lake, with_model(loaded, model), TABLE, TO, {"month": MONTHS}, ["parcel"], rows=300)
    assert spilled(lake.spill) == []
    assert commits == [TO, TO] and 10**9 - model.after == 8  # 2000 rows: 75, 150, 300, ... and the rest
    np.testing.assert_array_equal(done.histogram.sum(), 2000)
    expected = probability(loaded.pipeline, lake.read(TABLE)[FEATURES])
    np.testing.assert_array_equal(predictions(lake)["probability"], expected)


def test_the_fast_check_lets_nothing_pass_that_the_contract_refuses():
    rng = np.random.default_rng(0)
    inputs = [
        Input("a", "number", nullable=False, low=0, high=10),
        Input("b", "number", low=0),
        Input("c", "number"),
        Input("d", "text", categories=("x", "y"), unknown="refuse"),
        Input("e", "text", nullable=False, categories=("xx", "yy"), pattern="^[a-z]{2}$"),
        Input("f", "text"),
        Input("g", "text", pattern="^[a-z]$"),
    ]
    contract, passed, refused = as_contract(inputs), 0, 0
    odd = {"number": [-0.5, 11, np.nan, np.inf, -np.inf, 1e308], "text": ["z", "zz", "zzz", None, ""]}
    for turn in range(40):
        values = {
            one.name: [5.0] * 4 if one.kind == "number" else list(one.categories[:1] or "q") * 4 for one in inputs
        }
        for one in rng.choice(inputs, rng.integers(0, 3)):
            values[one.name][rng.integers(4)] = rng.choice(np.array(odd[one.kind], object))
        if turn % 3:
            values["g"] = [None] * 4
        table = shape(pd.DataFrame(values), inputs)
        bad = check(table, contract).bad_rows
        found = screen(pa.RecordBatch.from_pandas(pd.DataFrame(values)), inputs, contract)
        assert (found.outcome.bad_rows, found.bad.num_rows, len(found.table)) == (bad, bad, 4 - bad)
        if fast_check(table, inputs) is not None:
            assert bad == 0
            passed += 1
        refused += bad > 0
    assert passed > 5 and refused > 5


def test_predictions_name_their_model_version_and_a_missing_model_is_an_error(loaded, lake, parcels, monkeypatch):
    with temporary_store():
        with pytest.raises(RegistryError, match="no model 'parcels' in the registry .*Train and register one first"):
            load_model("parcels")
        register(log_model(loaded.pipeline, parcels[FEATURES], inputs=loaded.inputs), "parcels")
        with pytest.raises(
            RegistryError, match="has no version or alias 'champion' .versions: 1; aliases: challenger."
        ):
            load_model("parcels")
        stored = load_model("parcels", "challenger")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef")
    score(lake, stored, TABLE, TO, {"month": MONTHS}, ["parcel"])
    assert stored.inputs == loaded.inputs
    told = lake.read(TO)[["model", "model_version", "run_id", "source", "source_version"]].drop_duplicates()
    assert told.to_numpy().tolist() == [["parcels", 1, "0123456789abcdef", TABLE, lake.version(TABLE)]]
    np.testing.assert_array_equal(predictions(lake)["probability"], probability(loaded.pipeline, parcels[FEATURES]))


def test_inputs_as_json():
    text = ["x", None, 'say "ü"\n', "", "x"]
    rows = {
        "f": [1.5, None, np.inf, np.nan, 1e-30],
        "i": [1, None, -3, 4, 2**60],
        "b": [True, False, None, True, True],
        "d": pa.array(text).dictionary_encode(),
        "none": pa.nulls(5),
        'q"': [0.1] * 5,
    }
    found = [json.loads(row) for row in rows_as_json(pa.record_batch(rows)).to_pylist()]
    assert found[0] == {"f": 1.5, "i": 1, "b": True, "d": "x", "none": None, 'q"': 0.1}
    assert [row["f"] for row in found] == [1.5, None, "inf", None, 1e-30]
    assert [row["i"] for row in found] == [1, None, -3, 4, 2**60]
    assert [row["d"] for row in found] == ["x", None, 'say "ü"\n', "", "x"]


def test_times_as_json():
    at = dt.datetime(2013, 1, 2, 5, 30)
    rows = {
        "local": pa.array([at, None], pa.timestamp("us")),
        "utc": pa.array([at, None], pa.timestamp("us", "UTC")),
        "day": pa.array([at.date(), None], pa.date32()),
        "hour": pa.array([at.time(), None], pa.time64("us")),
        "took": pa.array([dt.timedelta(hours=1), None], pa.duration("us")),
        "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
    }
    found, nothing = (json.loads(row) for row in rows_as_json(pa.record_batch(rows)).to_pylist())
    assert nothing == dict.fromkeys(rows) and found["price"] == 1.5
    assert [pd.Timestamp(found[name]).tz_localize(None) for name in ("local", "utc")] == [at, at]
    assert found["day"] == "2013-01-02" and found["hour"].startswith("05:30:00") and isinstance(found["took"], str)


large = """
import resource, sys
from mlpkg.batch.predict import score
from mlpkg.data.inputs import Input
from mlpkg.data.lake import Lake
from mlpkg.models.registry import Loaded
from mlpkg.models.training import fit

root, small, large, refused = sys.argv[1:]
lake = Lake(root)
known = lake.batches("few/rows").read_next_batch().slice(0, 2000).to_pandas()
names = [name for name in known if name != "month"]
known["late"] = (known["x1"] > 0.5).astype(int)
inputs = [Input(name, "number", nullable=False, low=0, high=0 if name == refused else 1) for name in names]
loaded = Loaded(fit("logistic_regression", known, "late", names, []), None, {}, inputs)

def peak(source):
    "Peak memory after a source was scored, MiB"
    done = score(lake, loaded, source, "large/out", {"month": "2026-01"})
    assert done.quarantined == (done.rows if refused else 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(-peak(small) + peak(large))
"""


@pytest.mark.parametrize("kind", ["table", "csv", "bad"])
def test_memory_stays_flat(tmp_path, kind):
    rng, lake, sizes = np.random.default_rng(0), Lake(tmp_path), {"few/rows": 3, "many/rows": 12}
    rows = {f"x{i}": rng.uniform(0.001, 1, 50_000).round(3) for i in range(16 if kind == "bad" else 40)}
    part = pa.table({"month": pa.repeat("2026-01", 50_000)} | rows)
    for name, parts in sizes.items():
        lake.write(name, iter([part] * parts), mode="replace", partition={"month": "2026-01"})
        if kind == "csv":
            with CSVWriter(tmp_path / f"{name[:3]}.csv", part.schema) as out:
                for _ in range(parts):
                    out.write_table(part)
    sources = [str(tmp_path / "few.csv"), str(tmp_path / "man.csv")] if kind == "csv" else list(sizes)
    command = [sys.executable, "-c", large, str(tmp_path), *sources, "x0" if kind == "bad" else ""]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    grown, more = float(done.stdout.splitlines()[-1]), (12 - 3) * part.nbytes / 2**20
    more *= 2 if kind == "bad" else 1  # the inputs of bad rows, as JSON, are at least as large again
    print(f"{kind}: {grown:.0f} MiB more memory for {more:.0f} MiB more rows")
    assert grown < 0.75 * more  # nearly all of it is what deltalake buffers until a file is full


class Outage(OSError):
    "Stands for a store that fails at a certain place"


def failing(monkeypatch, at: float) -> list[str]:
    "Let the store fail before (at 1, 2, ...) or after (at 1.5, 2.5, ...) a write; returns the writes"
    writes, write = [], deltalake.write_deltalake

    def watched(table, *args, **kwargs):
        writes.append(str(getattr(table, "table_uri", table)))
        if len(writes) == at:
            raise Outage
        write(table, *args, **kwargs)
        if len(writes) + 0.5 == at:
            raise Outage

    for module in [one for name, one in sys.modules.items() if name.startswith("mlpkg.data.")]:
        if hasattr(module, "write_deltalake"):
            monkeypatch.setattr(module, "write_deltalake", watched)
    return writes


def rows_of(lake: Lake) -> tuple[set[int], set[int]]:
    "Parcels that are predicted, and those in quarantine"
    good, bad = (lake.read(name)["parcel"].tolist() if lake.exists(name) else [] for name in (TO, ASIDE))
    assert len(good) == len(set(good)) and len(bad) == len(set(bad))
    return set(good), set(bad)


def test_predictions_and_quarantine_change_together_wherever_the_store_fails(loaded, root, tmp_path, parcels):
    lake, everything = Lake(root, spill=tmp_path / "spill"), set(range(2000))
    first, second = ({3, 1500}, {4, 5, 1500})
    for run, bad in enumerate((first, second, set())):
        odd = parcels.assign(distance=parcels["distance"].mask(parcels["parcel"].isin(bad), -1.0))
        lake.write(TABLE, odd, mode="replace", partition={"month": MONTHS})
        before, at, done = rows_of(lake), 0.5, False
        while not done:
            at, expected = at + 0.5, (before, (everything - bad, bad))
            with pytest.MonkeyPatch.context() as patch:
                writes = failing(patch, at)
                try:
                    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
                    done = len(writes) < int(at)
                except (Outage, LakeError) as error:
                    assert isinstance(error, Outage) or isinstance(error.__cause__, Outage)
                    if "the rows are written" in str(error):
                        expected = expected[1:]
            after = rows_of(Lake(root))  # another process
            assert after in expected, f"run {run}, failed at {at}"
        assert rows_of(lake) == (everything - bad, bad)
        assert at > 2.5 or not bad
    assert lake.version(ASIDE) == lake.versions(ASIDE)["version"].max()


def test_a_value_that_cannot_be_read_sends_its_row_to_quarantine_and_no_other(loaded, lake, parcels, tmp_path):
    odd = parcels.astype({"distance": object, "weight": object})
    odd.loc[3, "distance"], odd.loc[1500, "weight"] = "12,5", "heavy"
    expected = probability(loaded.pipeline, parcels.drop(index=[3, 1500])[FEATURES])
    odd.to_csv(tmp_path / "p.csv", index=False)
    odd.astype({"distance": str, "weight": str}).replace("nan", None).to_parquet(tmp_path / "p.parquet")
    for name in ("p.csv", "p.parquet"):
        done = score(lake, loaded, str(tmp_path / name), TO, {"month": MONTHS}, ["parcel"], rows=300)
        assert (done.predicted, done.quarantined) == (1998, 2), name
        np.testing.assert_array_equal(predictions(lake)["probability"], expected)
        aside = lake.read(ASIDE).set_index("parcel")
        assert aside["reasons"].to_dict() == {
            3: "distance cannot be read; distance not null",
            1500: "weight cannot be read",  # a weight may be missing, and this one is not
        }
        assert json.loads(aside.loc[3, "inputs"])["distance"] == "12,5"
        told = done.outcome.violations.set_index(["column", "check"])["examples"]
        assert told["distance", "cannot be read"] == "12,5" and told["weight", "cannot be read"] == "heavy"


def test_a_column_that_mostly_cannot_be_read_is_refused(loaded, lake, parcels, tmp_path):
    before = state(lake)
    parcels.assign(weight=np.where(parcels.index < 900, "1", "far")).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(BatchError, match="column 'weight' should hold numbers, and 1,100 of 2,000 .* such as far"):
        score(lake, loaded, str(tmp_path / "p.csv"), TO, {"month": MONTHS}, ["parcel"], rows=300)
    assert state(lake) == before


@pytest.mark.parametrize("column", [schemas.Column(int), schemas.Column(float, nullable=True)])
def test_codes_that_a_contract_lists_are_compared_as_numbers(column, loaded, lake, parcels):
    column.checks = [schemas.Check.isin([0, 1, 2, 10])]
    coded = parcels.assign(distance=(parcels.index % 3).astype(column.dtype.type))
    inputs = inputs_from(schemas.DataFrameSchema({**CONTRACT.columns, "distance": column}), coded, FEATURES)
    assert inputs[0].categories == ("0", "1", "2", "10")
    odd = coded.assign(distance=coded["distance"].mask(coded.index == 7, 3))
    lake.write(TABLE, odd, mode="overwrite", change_schema=True)
    done = score(lake, Loaded(loaded.pipeline, None, {}, inputs), TABLE, TO, {"month": MONTHS}, ["parcel"], rows=300)
    assert (done.predicted, done.quarantined) == (1999, 1)
    assert lake.read(ASIDE)["reasons"].tolist() == ["distance one of 0, 1, 2, 10"]


def test_a_file_without_the_column_of_the_partition_is_one_part(loaded, lake, parcels, tmp_path):
    january = parcels[parcels["month"] == MONTHS[0]]
    score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"])
    expected = predictions(lake)
    for name in ("p.csv", "p.parquet"):
        january = january.drop(columns="month", errors="ignore")
        getattr(january, f"to_{name[2:]}")(tmp_path / name, index=False)
        done = score(lake, loaded, str(tmp_path / name), TO, {"month": MONTHS[0]}, ["parcel"], rows=300)
        assert (done.predicted, done.groups["value"].dropna().tolist()) == (1000, [MONTHS[0]])
        pd.testing.assert_frame_equal(predictions(lake), expected)
    with pytest.raises(BatchError, match="has no column 'month', .*give one value"):
        score(lake, loaded, str(tmp_path / "p.csv"), TO, {"month": MONTHS}, ["parcel"])


def with_codes(parcels: pd.DataFrame) -> tuple[pd.DataFrame, Loaded]:
    "The parcels with ZIP codes, more different ones than a model's description lists, and a model that knows them"
    codes = pd.Series(range(1500)).map("{:05}".format)
    known = parcels.assign(zip=codes.reindex(parcels.index % 1500).to_numpy())
    contract = schemas.DataFrameSchema({**CONTRACT.columns, "zip": schemas.Column(str)})
    pipeline = fit("hist_gradient_boosting", known.assign(late=known.index % 2), "late", NUMERIC, [*CATEGORICAL, "zip"])
    inputs = inputs_from(contract, known, [*FEATURES, "zip"])
    assert not inputs[-1].categories
    return known, Loaded(pipeline, None, {}, inputs)


def test_values_that_the_model_does_not_know_are_counted_shown_and_warned_of(lake, parcels, tmp_path, caplog):
    known, loaded = with_codes(parcels)
    known.to_parquet(tmp_path / "p.parquet")
    asked = (lake, loaded, str(tmp_path / "p.parquet"), TO, {"month": MONTHS}, ["parcel"])
    assert score(*asked, rows=300).unknown.empty and not caplog.records
    odd = known.assign(carrier=known["carrier"].mask(known.index < 40, "Blue"))
    odd.loc[50:54, "carrier"], odd.loc[300:699, "zip"] = "grey", odd.loc[300:699, "zip"].str.lstrip("0")
    odd.to_parquet(tmp_path / "p.parquet")
    done = score(*asked, rows=300)
    assert done.unknown[["column", "rows", "rate"]].to_numpy().tolist() == [["zip", 400, 0.2], ["carrier", 45, 0.0225]]
    assert done.unknown["examples"][1] == "Blue (it knows blue), grey"
    assert "300 (it knows 00300)" in done.unknown["examples"][0]
    [said] = [one.getMessage() for one in caplog.records]
    assert "zip: 400 of 2,000 rows (20.0%), such as" in said and "carrier: 45 of 2,000 rows (2.2%)" in said
    assert done.predicted == 2000


def test_a_batch_that_the_model_mostly_does_not_know_is_refused_unless_that_is_allowed(
    lake, parcels, tmp_path, monkeypatch
):
    known, loaded = with_codes(parcels)
    path = str(tmp_path / "p.parquet")
    known.assign(zip=known["zip"].str.lstrip("0")).to_parquet(path)
    asked = (lake, loaded, path, TO, {"month": MONTHS}, ["parcel"])
    with pytest.raises(
        BatchError, match=r"zip: 2,000 of 2,000 rows .*it knows 0.*Nothing was written.*max_unknown_rate"
    ):
        score(*asked)
    assert not lake.exists(TO)
    assert score(*asked, max_unknown=1).unknown["rate"].tolist() == [1.0]
    monkeypatch.setenv("MLPKG_BATCH__MAX_UNKNOWN_RATE", "1")
    assert score(*asked).predicted == 2000


def test_one_batch_that_the_model_mostly_does_not_know_is_not_hidden_by_the_others(lake, parcels, tmp_path):
    known, loaded = with_codes(parcels)
    odd = (known["month"] == MONTHS[1]) & (known.groupby("month").cumcount() < 600)
    known.assign(zip=known["zip"].mask(odd, "rebate (10%)")).to_parquet(tmp_path / "p.parquet")
    asked = (lake, loaded, str(tmp_path / "p.parquet"), TO)
    words = r"2,000 rows \(30.0%\), such as rebate \(10%\); zip: 600 of 1,000 rows of month 2026-02 \(60.0%\)\. Nothing"
    with pytest.raises(BatchError, match=words):
        score(*asked, {"month": MONTHS}, ["parcel"], rows=300)
    assert not lake.exists(TO)
    assert score(*asked, {"month": MONTHS}, ["parcel"], max_unknown=0.6).predicted == 2000
    assert score(*asked, {"month": MONTHS[:1]}, ["parcel"]).predicted == 1000


@pytest.mark.parametrize("share", [float("nan"), 50, -0.1])
def test_a_share_of_unknown_values_that_is_none_is_refused(lake, loaded, share):
    with pytest.raises(BatchError, match="max_unknown .*: give a share of a batch's rows, from 0 to 1"):
        score(lake, loaded, TABLE, TO, {"month": MONTHS}, ["parcel"], max_unknown=share)
    assert not lake.exists(TO)


def test_a_few_rows_that_are_all_new_are_predicted_and_warned_of(lake, parcels, tmp_path, caplog):
    known, loaded = with_codes(parcels)
    known.head(19).assign(carrier="grey").to_parquet(tmp_path / "p.parquet")
    done = score(lake, loaded, str(tmp_path / "p.parquet"), TO, {"month": MONTHS[0]}, ["parcel"])
    assert done.predicted == 19 and done.unknown["rows"].tolist() == [19]
    assert "carrier: 19 of 19 rows" in caplog.text
