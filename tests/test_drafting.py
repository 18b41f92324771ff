"""What `mlpkg new` takes each column of a table for, what it asks about, and how a person says otherwise.

Tables are made here and go through the library functions behind the command; tests/test_new.py runs what is written.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import Project
from pandera.pandas import DataFrameSchema
from pyarrow import parquet
from test_new import again, team_project, visits
from typer.testing import CliRunner

from mlpkg.cli.new import creating
from mlpkg.data.contracts import number_column
from mlpkg.models.inspection import InspectionError, inspect_table
from mlpkg.models.splits import SplitRule
from mlpkg.models.tasks import Task
from mlpkg.recipes.delivery import read_delivery
from mlpkg.recipes.draft import Draft
from mlpkg.recipes.drafting import draft_pipeline
from mlpkg.recipes.recipe import Recipe
from mlpkg.recipes.revising import Declared, draft_again, read_declared
from mlpkg.recipes.scaffold import find_project, write_pipeline

ROWS = 900


def members(**more: object) -> pd.DataFrame:
    "One row for each member of a club: nothing returns"
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"months_as_member": rng.integers(0, 72, ROWS), "fee": rng.gamma(4, 10, ROWS).round(2)})
    left = np.where(table["months_as_member"] + rng.normal(0, 20, ROWS) > 36, "no", "yes")
    return table.assign(**more, left=left)


def drafted(folder: Path, table: pd.DataFrame, target: str = "left", **asked: object) -> Draft:
    "A draft of a pipeline for a table"
    table.to_csv(folder / "given.csv", index=False)
    return draft_pipeline("given", str(folder / "given.csv"), target, **asked)


def said(made: Draft, words: str) -> list[str]:
    "The notes and warnings that have some words"
    return [one for one in [*made.notes, *made.warnings] if words in one]


def features(made: Draft) -> list[str]:
    return [name for name, one in made.found.columns.items() if one.use == "feature"]


def counts(low: int, high: int) -> np.ndarray:
    return np.random.default_rng(1).integers(low, high, ROWS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("monate_als_kunde", counts(0, 72)),
        ("age_of_driver", counts(18, 90)),
        ("number_of_guests", counts(1, 60)),
        ("employees", counts(5, 5000)),
        ("income_per_household", counts(200, 900) * 100),
        ("balance_with_account", counts(0, 90_000)),
        ("room_number", counts(1, 60)),
    ],
)
def test_what_counts_or_measures_is_no_group_whatever_its_name_ends_with(tmp_path, name, values):
    made = drafted(tmp_path, members(**{name: values}))
    assert made.group == "" and {"months_as_member", name} <= set(features(made)), made.notes


def test_a_number_that_may_count_or_name_things_is_a_feature_and_asked_about(tmp_path):
    made = drafted(tmp_path, members(main_driver=counts(1, 60)))
    assert "main_driver" in features(made) and len(said(made, "--group main_driver")) == 1
    assert not said(made, "--group months_as_member")
    assert not said(drafted(tmp_path, members(main_driver=counts(1, 60)), features=["main_driver"]), "main_driver")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("patient", list(range(60))),
        ("customer_no", list(range(60))),
        ("id_of_patient", list(range(60))),
        ("store_id", list(range(60))),
        ("kundennr", list(range(1000, 1060))),
        ("policy_number", [7919 * one % 9973 for one in range(60)]),
        ("lead_customer", [7919 * one % 9973 for one in range(60)]),
    ],
)
def test_numbers_that_name_what_returns_are_still_the_group(tmp_path, name, values):
    made = drafted(tmp_path, visits(name, values), "outcome")
    assert made.group == name and f"--feature {name}" in said(made, "it is the group")[0]


def test_group_none_keeps_what_returns_as_a_feature_unless_it_identifies_people(tmp_path):
    table = visits("customer", [7919 * one % 9973 for one in range(60)])
    table = table.assign(email=[f"p{one}@example.org" for one in table["customer"]])
    made = drafted(tmp_path, table, "outcome", group="none")
    assert "customer" in features(made) and "email" not in features(made)
    assert made.group == "" and said(made, "customer: names something that returns") and not said(made, "customer: id")


@pytest.mark.parametrize(
    ("name", "why", "risk"),
    [
        ("customer", "names something that returns", ""),
        ("email", "identifies people", "in the lake"),
        ("ticket", "is another one in nearly every row", "by heart"),
        ("refund", "gives outcome away by itself", "only afterwards"),
        ("call", "nearly tells outcome by itself", "only afterwards"),
    ],
)
def test_a_feature_that_is_asked_for_wins_over_what_was_found(tmp_path, name, why, risk):
    rng = np.random.default_rng(0)
    table = visits("customer", [7919 * one % 9973 for one in range(60)])
    table["email"] = [f"p{one}@example.org" for one in table["customer"]]
    table["ticket"] = rng.permutation(300) + 70_000
    table["refund"] = (table["outcome"] == "yes") * 7
    table["call"] = table["refund"].where(rng.uniform(size=300) > 0.02, 7 - table["refund"])
    before = drafted(tmp_path, table, "outcome")
    assert said(before, why) and (name in features(before)) == (name == "call")
    made = drafted(tmp_path, table, "outcome", features=[name])
    told = said(made, f"{name}: {why}")
    assert name in features(made) and len(told) == 1 and "a feature, as asked" in told[0] and risk in told[0]
    assert (told[0] in made.warnings) == bool(risk)
    assert made.group == ("" if name == "customer" else "customer")
    assert name in made.sample()


def test_a_feature_that_cannot_be_one_is_refused_or_said(tmp_path):
    table = members(club="north", joined="2026-01-05")
    made = drafted(tmp_path, table, features=["club"])
    assert "club" not in features(made) and any("club" in one and "--feature" in one for one in made.warnings)
    for name, words in (("weather", "no column 'weather' for --feature"), ("left", "--feature left: it is the target")):
        with pytest.raises(InspectionError, match=words):
            drafted(tmp_path, table, features=[name])
    with pytest.raises(InspectionError, match="--feature fee: it is the group"):
        inspect_table(table, "left", group="fee", features=["fee"])


AGES = np.random.default_rng(2).normal(45, 15, ROWS).round().clip(18, 87)


def with_code(values: np.ndarray, code: float, times: int = 41) -> np.ndarray:
    return np.where(np.arange(len(values)) < times, code, values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (with_code(AGES, 99), "age: 99 occurs 41 times, and nothing is between 87 and 99"),
        (with_code(counts(18, 88), 99), "age: 99 occurs 41 times, and nothing is between 87 and 99"),
        (with_code(counts(1, 6), 9), "age: 9 occurs 41 times, and nothing is between 5 and 9"),
        (with_code(counts(0, 900), 999), "age: 999 occurs 41 times, and nothing is between 899 and 999"),
        (with_code(np.r_[1:872, 1:30], -1, 300), "age: -1 occurs 300 times, and no other value is below 1"),
        (with_code(counts(0, 60), -9), "age: -9 occurs 41 times, and no other value is below 0"),
        (with_code(with_code(counts(0, 31), 99, 60), 77, 30), "age: 77 occurs 30 times, 99 occurs 30 times"),
    ],
    ids=["age", "even", "scale", "hundreds", "minus one", "minus nine", "two codes"],
)
def test_codes_that_may_mean_unknown_are_asked_about_and_stay(tmp_path, values, words):
    made = drafted(tmp_path, members(age=values))
    told = said(made, words)
    assert len(told) == 1 and told[0] in made.warnings, made.warnings
    codes = "77, 99" if "77" in words else words.split()[1]
    assert f"blanks=[{codes}] into its rule in given_contract" in told[0]
    assert made.blanks == {} and (made.found.table["age"] == values[0]).sum() >= 30


_tail = np.repeat([0, 1, 2, 3, 4, 5, 9], [400, 280, 120, 60, 25, 10, 5])


@pytest.mark.parametrize(
    "values",
    [
        np.r_[counts(1, 99)[:-60], [98] * 20, [99] * 40],  # Hours a week that are cut off at 99
        np.random.default_rng(0).permutation(_tail),  # Nine children are rare, and five are not
        np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2, 3, 4], [60, 300, 240, 150, 100, 50])),  # Floors
        np.random.default_rng(0).integers(-1, 2, ROWS),  # Against, neither, for
        np.random.default_rng(0).normal(0, 9, ROWS).round(),
        with_code(AGES, 99, 1),
    ],
    ids=["cut off", "tail", "floors", "signs", "both signs", "once"],
)
def test_values_that_look_like_codes_and_belong_to_the_others_are_not_asked_about(tmp_path, values):
    assert not said(drafted(tmp_path, members(age=values)), "if it means unknown")


@pytest.fixture
def project(tmp_path) -> Project:
    "A project in which nothing was run"
    (tmp_path / "stores" / "var").mkdir(parents=True)
    (tmp_path / "team").mkdir()
    return team_project(tmp_path / "team", tmp_path / "stores")


def write(project: Project, table: pd.DataFrame, **asked: object) -> Path:
    "Write a pipeline for a table; returns the page of its recipe"
    table.to_csv(project.root / "given.csv", index=False)
    write_pipeline(
        draft_pipeline("sales", str(project.root / "given.csv"), "left", **asked), find_project(project.root)
    )
    return project.root / "nbs" / "api" / "10_sales.ipynb"


def test_what_a_recipe_lists_as_unknown_is_not_asked_about_again(project):
    page = write(project, members(age=with_code(AGES, 99)))
    own = page.read_text().replace('\\"Age\\", 0, 140)', '\\"Age\\", 0, 140, blanks=[99])')
    assert own != page.read_text()
    page.write_text(own)
    there = read_declared(find_project(project.root), "sales")
    made = draft_again(there, "sales", str(project.root / "given.csv"), "left")
    assert not said(made, "if it means unknown") and made.blanks == {"age": [99]}
    assert again(project, lambda t: t, "left") == []


def test_what_was_asked_for_stays_a_feature_for_newer_data(project):
    table = members(
        email=[f"p{one}@example.org" for one in range(ROWS)], customer=counts(0, 200), shop_id=counts(0, 40)
    )
    write(project, table, features=["email", "customer"], group="none")
    assert again(project, lambda t: t, "left") == []
    assert any(
        "months_as_member is gone" in one
        for one in again(project, lambda t: t.drop(columns="months_as_member"), "left")
    )


def test_things_that_were_left_out_stay_so_for_newer_data(project):
    page = write(project, members(customer=counts(0, 200), shop_id=counts(0, 40)))
    assert "customer, shop_id: names something that returns, left out" in page.read_text()
    assert again(project, lambda t: t, "left") == []
    told = again(project, lambda t: t, "left", features=["customer"])
    assert "customer was left out, and is now a feature, numbers" in told


TENANTS = [
    f"{first} {last}"
    for first in ("Hans", "Anna", "Peter", "Klaus")
    for last in "Maier Weber Kunz Roth Beck Lang Vogt Ott".split()
]


def test_advice_to_give_a_group_says_that_names_of_people_would_be_stored(tmp_path):
    table = visits("tenant", TENANTS * 2)
    asked = said(drafted(tmp_path, table, "outcome"), "--group tenant")
    assert len(asked) == 1 and "would store" in asked[0] and "a number for each" in asked[0]
    given = said(drafted(tmp_path, table, "outcome", group="tenant"), "identifies people")
    assert len(given) == 1 and "in the lake and in sample.csv, which goes into git" in given[0]


def test_advice_to_give_a_group_says_that_it_would_be_stored(tmp_path):
    table = visits("batch", [7919 * one % 9973 for one in range(60)])
    assert "it is stored" in said(drafted(tmp_path, table, "outcome"), "--group batch")[0]
    table = table.assign(customer=table["batch"] + 1, device=table["batch"] + 2)
    assert "it is stored" in said(drafted(tmp_path, table, "outcome"), "--group customer")[0]


def german(folder: Path) -> str:
    "A file whose columns need other names"
    rng, spaced = np.random.default_rng(0), {f"Spalte {one}": np.arange(200) % 7 + one for one in range(12)}
    table = pd.DataFrame({"Preis (EUR) ": rng.gamma(4, 100, 200).round(2), "Part": np.arange(200) % 5, **spaced})
    table["Verkauft am"] = pd.date_range("2026-01-01", periods=200).strftime("%Y-%m-%d")
    table["Kunde Nr."] = np.arange(200) % 50 + 4000
    table.to_csv(folder / "given.csv", index=False)
    return str(folder / "given.csv")


@pytest.mark.parametrize("name", ["Preis (EUR) ", "Preis (EUR)", "preis_eur", "PREIS_EUR"])
def test_columns_are_given_by_their_names_in_the_file_or_by_those_in_the_table(tmp_path, name):
    made = draft_pipeline("given", german(tmp_path), name, "Verkauft am", "Kunde Nr.", features=["Part", "Spalte 1"])
    assert (made.label, made.time, made.group) == ("preis_eur", "verkauft_am", "kunde_nr")
    assert {"part_given", "spalte_1"} <= set(features(made))
    assert (
        draft_pipeline("given", german(tmp_path), "part", features=["kunde_nr", "part_given"][:1]).label == "part_given"
    )


def test_no_new_name_of_a_column_is_left_unsaid(tmp_path, project, monkeypatch):
    source = german(tmp_path)
    monkeypatch.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))
    asked = [
        "given",
        "--data",
        source,
        "--target",
        "Preis (EUR)",
        "--group",
        "Kunde Nr.",
        "--feature",
        "Part",
        "--dry-run",
    ]
    shown = CliRunner().invoke(creating, [*asked, "--feature", "Spalte 11"])
    assert shown.exit_code == 0, shown.output
    assert all(f"'Spalte {one}' is spalte_{one}" in shown.output for one in range(12))
    assert "'Kunde Nr.' is kunde_nr" in shown.output and "'part' is part_given" in shown.output
    assert "..." not in shown.output


def test_shares_are_printed_beside_the_classes_that_have_them(tmp_path):
    table = members()
    share = (table["left"] == "yes").mean()
    assert said(drafted(tmp_path, table), f"left: two classes (no: {1 - share:.0%}, yes: {share:.0%}): binary")
    grades = np.repeat([3, 1, 2], [450, 270, 180])
    assert said(
        drafted(tmp_path, members(grade=grades), "grade"), "grade: 3 classes (1: 30%, 2: 20%, 3: 50%): multiclass"
    )


def test_a_draft_says_what_a_batch_is_and_does_as_asked(tmp_path):
    days = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.sort(counts(0, 200)), unit="D")
    table = members(sold=days.strftime("%Y-%m-%d"))
    usual = [(table, {}, "file"), (table, {"time": "sold"}, "month"), (table.head(200), {"time": "sold"}, "file")]
    for rows, asked, batch in usual:
        made = drafted(tmp_path, rows, **asked)
        assert made.batch == batch and len(said(made, "--batch") if asked else said(made, "is a batch")) == 1, (
            made.notes
        )
    assert said(drafted(tmp_path, table, time="sold"), "Batches are the months of sold")
    for batch in ("file", "month", "day"):
        made = drafted(tmp_path, table, time="sold", batch=batch)
        filled = made.values("team.given", "")
        assert (made.batch, filled["batch"]) == (batch, batch)
        assert said(made, "A file is a batch" if batch == "file" else f"Batches are the {batch}s of sold")
    with pytest.raises(InspectionError, match="--batch month needs a column of times: give --time too"):
        drafted(tmp_path, table, batch="month")


def test_a_batch_that_was_chosen_stays_for_newer_data(project):
    days = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.sort(counts(0, 200)), unit="D")
    write(project, members(sold=days.strftime("%Y-%m-%d")), time="sold", batch="file")
    assert again(project, lambda t: t, "left") == []
    told = again(project, lambda t: t, "left", batch="month")
    assert "batches are months, and were files" in told and '+batch = "month"' in told


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_timestamps_of_a_parquet_file_are_times(tmp_path, zone):
    days = pd.date_range("2026-01-01", periods=ROWS, freq="3h", tz=zone)
    members(seen=days, joined=days - pd.Timedelta(days=40)).to_parquet(tmp_path / "given.parquet")
    made = draft_pipeline("given", str(tmp_path / "given.parquet"), "left", time="seen", batch="day")
    kinds = {name: made.found.columns[name].kind for name in ("seen", "joined")}
    assert kinds == {"seen": "time", "joined": "time"} and made.split().by == "time"
    assert (
        f"{made.found.table['seen'].min():%Y-%m-%d %H}"
        == f"{days[0].tz_convert('UTC') if zone else days[0]:%Y-%m-%d %H}"
    )


def test_dots_stay_in_a_column_with_a_word_that_makes_it_texts(tmp_path):
    driven = [f"{one:,}".replace(",", ".") if at % 25 else "k.A." for at, one in enumerate(counts(10_000, 90_000))]
    used = [f"{one / 10}".replace(".", ",") for one in counts(50, 90)]
    members(km=driven, litres=used).to_csv(tmp_path / "given.csv", index=False, sep=";")
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "left")
    assert set(made.found.table["km"]) == set(driven) and "thousands" not in made.rule("km")
    assert not said(made, "between thousands")


def test_numbers_with_commas_between_thousands_are_numbers_in_files(tmp_path):
    amounts = counts(100, 90_000) / 10
    for separator in ",;":
        members(paid=[f"{one:,.2f}" for one in amounts]).to_csv(tmp_path / "given.csv", index=False, sep=separator)
        made = draft_pipeline("given", str(tmp_path / "given.csv"), "left")
        assert made.found.table["paid"].max() == amounts.max()
        assert said(made, "numbers have a comma between thousands (paid)")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([f"${one / 100:.2f}" for one in counts(100, 90_000)], "'$"),
        ([f"{one} km" if one % 9 else f"{one} mi" for one in counts(100, 90_000)], " km' and '"),
        ([f"{one} PS" for one in counts(5, 15) * 10], " PS'"),
        ([f"EUR {one},50" for one in counts(5, 900)], "'EUR "),
        ([f"{one}%" for one in counts(5, 100)], "%'"),
    ],
)
def test_numbers_with_units_are_pointed_out(tmp_path, values, shown):
    (words,) = said(drafted(tmp_path, members(given=values)), "a model takes these as texts")
    assert words.startswith("given: numbers with units, such as '") and shown in words


@pytest.mark.parametrize(
    "values",
    [
        [f"K-{one:05d}" for one in counts(0, 900)],
        [f"{one:02d}:15" for one in counts(8, 18)],
        [f"{one % 12 + 1:02d}/{2000 + one}" for one in counts(4, 25)],
        [f"{one}/{one + 1}" for one in counts(2, 9)],
        [f"M{one}" for one in counts(10, 60)],
        [f"room {one}" for one in counts(10, 60)],
        ["2 weeks", "1 month", "6 months", "1 year"] * (ROWS // 4),
    ],
)
def test_texts_with_numbers_in_them_are_no_numbers_with_units(tmp_path, values):
    assert not said(drafted(tmp_path, members(given=values)), "as texts")


@pytest.mark.parametrize(
    ("no", "yes"),
    [
        ("nein", "ja"), ("non", "oui"), ("no", "yes"), ("No", "Yes"), ("nee", "ja"), ("no", "Yes"), ("nein ", "Ja"),
        ("N", "J"), ("hayır", "evet"), ("nem", "igen"), ("нет", "да"), ("falsch", "Wahr"), ("negative", "Positive"),
        ("KS", "NE"), ("-", "+"), ("not paid", "paid"), ("no churn", "churn"), ("late", "ne"), ("NY", "OH"),
    ],
)  # fmt: skip
def test_the_probability_is_that_of_the_yes_and_this_is_said(tmp_path, no, yes):
    table = members()
    made = drafted(tmp_path, table.assign(left=table["left"].map({"no": no, "yes": yes})))
    assert made.task.classes == (no, yes)
    assert said(made, f"binary, and probabilities are those of {yes}")


def test_what_the_rules_need_is_said_as_it_is(tmp_path):
    days = pd.date_range("2026-01-01", periods=30).repeat(30)
    (words,) = said(drafted(tmp_path, members(seen=days.strftime("%Y-%m-%d")), time="seen"), "independent blocks")
    assert "in 6 independent blocks" in words and "need 5 blocks" in words and "will promote no model" not in words


def test_a_batch_of_one_day_is_said_to_be_one_observation(tmp_path):
    days = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.sort(counts(0, 200)), unit="D")
    table, words = members(sold=days.strftime("%Y-%m-%d")), "drift stays unknown"
    for batch, expected in (("day", 1), ("month", 0), ("file", 0)):
        made = drafted(tmp_path, table, time="sold", batch=batch)
        assert sum(words in one for one in made.warnings) == expected, made.warnings
        assert not any("--batch day" in one or "or day" in one for one in made.notes), made.notes


@pytest.mark.parametrize("value", [0, 1, -1, 999_999, 123_456, 99_999_999, 37.5])
def test_placeholders_in_a_target_are_asked_about_and_stay(tmp_path, value):
    price = np.random.default_rng(3).lognormal(9, 0.5, ROWS).round(2).clip(1500, 60_000)
    price[5:900:60] = value
    made = drafted(tmp_path, members(price=price), "price")
    (words,) = said(made, "if it means unknown")
    assert f"price: {value} occurs 15 times" in words and f"blanks=[{value}]" in words
    assert "Until then it is learned as it stands" in words
    assert (made.found.table["price"] == value).sum() == 15
    known = draft_pipeline("given", str(tmp_path / "given.csv"), "price", blanks={"price": [value]})
    assert not said(known, "if it means unknown") and known.rows == ROWS - 15


@pytest.mark.parametrize("shape", ["capped", "skewed", "dry days", "rounded"])
def test_usual_targets_have_no_placeholders(tmp_path, shape):
    rng = np.random.default_rng(4)
    values = {
        "capped": rng.normal(22, 9, ROWS).round(1).clip(5, 50),
        "skewed": rng.lognormal(3, 1.5, ROWS).round(2),
        "dry days": np.where(rng.uniform(size=ROWS) < 0.5, 0, rng.gamma(2, 8, ROWS).round(1) + 1),
        "rounded": rng.lognormal(9, 0.6, ROWS).round(-2),
    }
    assert not said(drafted(tmp_path, members(cost=values[shape]), "cost"), "if it means unknown")


def test_spellings_of_one_text_become_one_in_a_new_recipe_and_are_asked_about_later(tmp_path):
    fuel = np.random.default_rng(5).choice(["petrol", "Petrol", "petrol ", "Diesel"], ROWS, p=[0.5, 0.2, 0.1, 0.2])
    made = drafted(tmp_path, members(fuel=fuel))
    (words,) = said(made, "differ only in capitals and blanks")
    assert "'petrol' (" in words and "'Petrol' (" in words and "'petrol ' (" in words and "Diesel" not in words
    assert "`one_spelling` in clean_given makes them one" in words
    assert made.values("team.given", "")["spelled"] == '("fuel",)'
    again = draft_pipeline("given", str(tmp_path / "given.csv"), "left", spelled=[])
    assert len(said(again, 'write rows.assign(fuel=one_spelling(rows["fuel"])) into clean_given')) == 1
    table = members()
    table.loc[:20, "left"] = "Yes "
    (words,) = said(drafted(tmp_path, table), "differ only in capitals and blanks")
    assert "are classes of their own" in words and "into the file" in words


@pytest.mark.parametrize("kind", [pa.decimal128(10, 2), pa.decimal256(40, 2)])
def test_decimals_of_a_parquet_file_are_numbers(tmp_path, kind):
    table = members(price=np.random.default_rng(6).gamma(4, 100, ROWS).round(2))
    table.loc[:5, "price"] = np.nan
    made = pa.Table.from_pandas(table, preserve_index=False)
    place = made.schema.get_field_index("price")
    made = made.set_column(place, "price", made["price"].cast(kind))
    parquet.write_table(made, tmp_path / "given.parquet")
    for target in ("left", "price"):
        draft = draft_pipeline("given", str(tmp_path / "given.parquet"), target)
        assert draft.found.columns["price"].kind == "number" and draft.found.table["price"].dtype == "float64"
    assert draft.task.kind == "regression"


@pytest.mark.parametrize(("comma", "low"), [(True, 1000), (False, 1.0)])
def test_numbers_with_dots_before_three_digits_are_read_as_the_file_shows_or_as_it_is_said(tmp_path, comma, low):
    rng = np.random.default_rng(8)
    km = [f"{one:,}".replace(",", ".") for one in rng.integers(1000, 300_000, ROWS)]
    litres = rng.uniform(1, 5, ROWS).round(1 if comma else 0)
    table = members(km=km, litres=[f"{one:g}".replace(".", ",") for one in litres]).drop(columns="fee")
    table.to_csv(tmp_path / "given.csv", index=False, sep=";")
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "left")
    assert made.found.table["km"].min() >= low and (made.found.table["km"].max() > 1000) == comma
    (words,) = said(made, "three digits behind the dot")
    told = f'write thousands="{"" if comma else "."}" into the rule of the column in given_contract'
    assert words.startswith("km: ") and told in words
    rules = {one["name"]: one["rule"] for one in made.values("team.given", "")["columns"]}
    assert ('thousands="."' in rules["km"]) == comma
    there = Declared(rules | {"km": 'number_column("Km", 0, 90, thousands=".")'}, {"target": "1"})
    again = draft_again(there, "given", str(tmp_path / "given.csv"), "left")
    assert again.found.table["km"].min() >= 1000 and not said(again, "three digits behind the dot")


def test_the_contract_says_what_dots_mean_in_later_files_of_any_kind(tmp_path):
    rules = {"km": number_column("Kilometres", 0, 400_000, thousands="."), "litres": number_column("Litres", 0, 9)}
    rules["late"] = number_column("Late", among=[0, 1], nullable=True)
    recipe = Recipe(
        "cars", "late", Task("binary", (0, 1)), ("km", "litres"), (), lambda: DataFrameSchema(rules),
        SplitRule("row", ("row_id",)),
    )  # fmt: skip
    for separator in (";", ","):
        lines = [f"{km}{separator}{litres}" for km, litres in (("40.604", "1.250"), ("950", "2.125"), ("9.500", "3"))]
        (tmp_path / "later.csv").write_text("\n".join([f"km{separator}litres", *lines]) + "\n")
        rows = read_delivery(recipe, str(tmp_path / "later.csv")).rows
        assert rows["km"].tolist() == [40604, 950, 9500] and rows["litres"].tolist() == [1.25, 2.125, 3]


def test_times_of_day_are_no_group_and_it_is_said_how_they_become_a_feature(tmp_path):
    clock = [f"{one // 60:02d}{one % 60:02d}" for one in counts(0, 1440)]
    made = drafted(tmp_path, members(departure=clock))
    assert made.group == "" and "departure" in features(made)
    assert made.rule("departure") == 'text_column("Departure, a time of day like 0930")'
    (words,) = said(made, "minutes_of_day")
    assert words.startswith("departure: times of day, such as ") and "`departure_minutes=minutes_of_day(rows[" in words
    assert '`"departure_minutes": number_column("Departure minutes", 0, 1439, made=True)`' in words


@pytest.mark.parametrize("last", [58, 69])
@pytest.mark.parametrize("name", ["customer_id", "desk"])
def test_codes_with_zeros_in_front_are_no_times_of_day(tmp_path, name, last):
    made = drafted(tmp_path, members(**{name: [f"{one:04d}" for one in counts(1, last + 1)]}))
    assert made.group == name and not said(made, "minutes_of_day")
    assert "time of day" not in made.rule(name)


def test_descriptions_keep_the_names_of_the_file(tmp_path):
    table = members(MaxHR=counts(60, 200), **{" Wohnfläche  (m²)": counts(20, 90), "x" * 70: counts(0, 9)})
    made = drafted(tmp_path, table)
    told = {name: made.rule(name).partition('"')[2].partition('"')[0] for name in made.kept_columns()}
    assert told["maxhr"] == "MaxHR" and told["wohnfläche_m2"] == "Wohnfläche (m²)" and told["fee"] == "Fee"
    assert told["x" * 70] == "X" + "x" * 69
