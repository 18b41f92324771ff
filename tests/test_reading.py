"""Numbers as files write them: decimal commas, dots between thousands, names with dots, zeros in front.

Files are written here, go through `draft_pipeline`, and are read again by the contract that it writes, as `mlpkg new`
and the step `ingest` do; what is found in texts is in the pages about notation and tables.
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest

from mlpkg.data import contracts
from mlpkg.data.columns import one_spelling
from mlpkg.data.contracts import check, number_column
from mlpkg.data.sources import SourceError
from mlpkg.data.tabular import plain_names
from mlpkg.examples.diamonds import recipe as diamonds
from mlpkg.recipes.delivery import Delivery, read_delivery, read_table
from mlpkg.recipes.draft import Draft
from mlpkg.recipes.drafting import draft_pipeline
from mlpkg.recipes.preparation import clean_rows, split_rows
from mlpkg.recipes.recipe import Recipe, unread_column
from mlpkg.recipes.revising import Declared, Revision, draft_again
from mlpkg.recipes.spelling import rule_arguments

ROWS = 400
RNG = np.random.default_rng(11)
WHOLE = RNG.integers(200, 90_000, ROWS)


def dots(number: float, places: int = 0) -> str:
    "A number as a German spreadsheet writes it"
    return f"{number:,.{places}f}".translate(str.maketrans(",.", ".,"))


def written(folder: Path, separator: str = ";", **columns: object) -> str:
    "A file with columns of texts as they are, beside a number and a label"
    size = np.arange(ROWS) % 7
    late = np.where(size + RNG.normal(0, 3, ROWS) > 3, "yes", "no")
    table = pd.DataFrame({**columns, "size": size, "late": late})
    table.to_csv(folder / "given.csv", index=False, sep=separator)
    return str(folder / "given.csv")


def drafted(folder: Path, **columns: object) -> Draft:
    return draft_pipeline("given", written(folder, **columns), "late")


def rules(made: Draft) -> dict[str, str]:
    return {one["name"]: one["rule"] for one in made.values("team.given", "")["columns"]}


def recipe(made: Draft, **changed: str) -> Recipe:
    "The recipe that a draft writes, with rules that somebody has changed"
    code = rules(made) | changed
    columns = {name: eval(rule, vars(contracts)) for name, rule in code.items()}
    names = [name for name in columns if name != made.label]
    texts = [name for name in names if code[name].startswith("text_column")]
    return Recipe(
        "given", made.label, made.task, tuple(one for one in names if one not in texts), tuple(texts),
        lambda: pa.DataFrameSchema(columns), made.split(),
    )  # fmt: skip


def later(folder: Path, made: Draft, text: str, **changed: str) -> Delivery:
    "A later file, read by the contract"
    (folder / "later.csv").write_text(text)
    return read_delivery(recipe(made, **changed), str(folder / "later.csv"))


def said(made: Draft, words: str) -> list[str]:
    return [one for one in [*made.notes, *made.warnings] if words in one]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_whole_amounts_of_a_later_file_are_read_as_those_with_cents_were(tmp_path, separator):
    made = drafted(
        tmp_path, paid=[dots(one / 100, 2) for one in WHOLE * 37], litres=[dots(one / 10, 1) for one in WHOLE]
    )
    assert 'thousands="."' in rules(made)["paid"] and 'thousands="."' in rules(made)["litres"]
    lines = [separator.join(one) for one in (("paid", "litres", "size"), ("1.234", "7.000", "1"), ("950", "8", "2"))]
    rows = later(tmp_path, made, "\n".join(lines) + "\n").rows
    assert rows["paid"].tolist() == [1234, 950] and rows["litres"].tolist() == [7000, 8]


def test_the_sample_is_read_as_the_file_was(tmp_path):
    made = drafted(
        tmp_path, paid=[dots(one / 100, 2) for one in WHOLE * 37], share=[dots(one / 1000, 3) for one in WHOLE],
        km=[dots(one) for one in WHOLE],
    )  # fmt: skip
    rows, table = later(tmp_path, made, made.sample_text()).rows, made.sample()
    for name in ("paid", "share", "km"):
        assert np.array_equal(rows[name], table[name]), name
    assert check(rows, recipe(made).contract()).bad_rows == 0


@pytest.mark.parametrize("comma", [True, False])
def test_the_sample_fits_also_once_somebody_has_said_what_dots_mean(tmp_path, comma):
    more = {"litres": [dots(one / 10, 1) for one in WHOLE]} if comma else {}
    made = drafted(tmp_path, km=[dots(one) for one in WHOLE], **more)
    other = 'number_column("Km", thousands="{}")'.format("" if comma else ".")
    rows = later(tmp_path, made, made.sample_text(), km=other).rows
    factor = 1000 if comma else 1 / 1000
    before = made.sample()["km"].to_numpy()
    large = before > 1000 if comma else rows["km"].to_numpy() > 1000
    assert large.mean() > 0.9 and np.allclose(rows["km"][large] * factor, before[large])


def test_a_number_written_otherwise_is_missing_in_a_draft_and_goes_to_quarantine_later(tmp_path):
    litres = [dots(one / 10, 1) for one in WHOLE]
    litres[7] = "12.5"
    made = drafted(tmp_path, litres=litres)
    assert made.found.table["litres"].isna().sum() == 1 and made.found.table["litres"].max() < 90_000
    assert "12.5" not in set(pd.read_csv(io.StringIO(made.sample_text()), dtype="str")["litres"])
    (words,) = said(made, "'12.5'")
    assert words.startswith("litres: ") and "taken as missing" in words
    found = later(tmp_path, made, "litres;size\n12,5;1\n12.5;2\n1.250;3\n7;4\n")
    assert found.rows[unread_column].tolist() == ["", "litres", "", ""]
    assert found.rows["litres"].dropna().tolist() == [12.5, 1250, 7]


def test_a_file_that_writes_points_is_refused_where_the_contract_says_dots(tmp_path):
    made = drafted(tmp_path, litres=[dots(one / 10, 1) for one in WHOLE])
    with pytest.raises(
        SourceError, match=r'should hold numbers like 1\.234,5.*thousands="\." in the contract.*found .12\.5.'
    ):
        later(tmp_path, made, "litres;size\n12.5;1\n13.7;2\n1.250;3\n")


def test_blanks_are_known_in_numbers_with_dots(tmp_path):
    paid = [dots(one / 100, 2) for one in WHOLE * 37]
    paid[3], paid[4] = "?", "?"
    made = drafted(tmp_path, paid=paid)
    assert made.blanks == {"paid": ["?"]} and made.found.columns["paid"].kind == "number"
    rows = later(
        tmp_path,
        made,
        "paid;size\n1.234;1\n?;2\n-999;3\n",
        paid='number_column("Paid", 0, blanks=["?", -999], thousands=".")',
    ).rows
    assert rows["paid"].isna().tolist() == [False, True, True] and rows["paid"][0] == 1234


def test_names_with_dots_are_texts_and_amounts_in_millions_are_numbers(tmp_path):
    parts = RNG.integers(100, 1000, (ROWS, 3))
    names = [".".join(map(str, one)) for one in parts]
    amounts = [dots(one) for one in RNG.integers(100_000, 80_000_000, ROWS)]
    round_ones = [dots(one * 1_000_000) for one in RNG.integers(100, 1000, ROWS)]
    made = drafted(tmp_path, customer=names, turnover=amounts, budget=round_ones)
    kinds = {name: made.found.columns[name].kind for name in ("customer", "turnover", "budget")}
    assert kinds == {"customer": "text", "turnover": "number", "budget": "number"}
    assert set(made.found.table["customer"]) == set(names)
    (words,) = said(made, "are taken as names")
    assert "customer" in words and "nine digits" in words and "turnover" not in words
    returning = drafted(tmp_path, ref=[names[at % 50] for at in range(ROWS)], turnover=amounts)
    assert returning.group == "ref"


def test_coordinates_beside_decimal_commas_are_decimals(tmp_path):
    places = {
        "lat": [f"{one:.3f}" for one in RNG.uniform(47, 55, ROWS)],
        "geo_lon": [f"{one:.3f}" for one in RNG.uniform(6, 15, ROWS)],
    }
    made = drafted(tmp_path, **places, km=[dots(one) for one in WHOLE], litres=[dots(one / 10, 1) for one in WHOLE])
    table = made.found.table
    assert table["lat"].max() < 56 and table["geo_lon"].max() < 16 and table["km"].max() > 1000
    (read,) = (
        said(made, "are read as 5") + said(made, "are read as 4")
        if said(made, "are read as 5")
        else said(made, "are read as 4")
    )
    assert "lat" in read and 'thousands="."' in read
    assert 'thousands=""' in rules(made)["lat"] and 'thousands="."' in rules(made)["km"]


def test_one_message_for_all_columns_says_what_numbers_were_read_as(tmp_path):
    made = drafted(
        tmp_path, km=["40.604", *map(dots, WHOLE[1:])], miles=[dots(one) for one in WHOLE],
        litres=[dots(one / 10, 1) for one in WHOLE],
    )  # fmt: skip
    (words,) = said(made, "behind the dot")
    assert words.startswith("km, miles: ") and "'40.604'" in words and "read as 40604" in words
    assert 'thousands=""' in words and "sample.csv" not in words


@pytest.mark.parametrize("comma", [True, False])
def test_a_column_that_writes_thousands_in_two_ways_is_told(tmp_path, comma):
    km = [dots(one) if at % 3 else str(one) for at, one in enumerate(WHOLE)]
    made = drafted(tmp_path, km=km, **({"litres": [dots(one / 10, 1) for one in WHOLE]} if comma else {}))
    (words,) = said(made, "behind the dot")
    assert words.startswith("km: ") and "without a dot" in words
    assert (made.found.table["km"].median() > 10_000) == comma


def test_numbers_with_zeros_in_front_stay_as_they_are(tmp_path):
    codes = RNG.choice(["01067", "10115", "80331", "04109"], ROWS)
    hours = [f"{one % 24:02d}" for one in range(ROWS)]
    made = drafted(tmp_path, plz=codes, hour=hours)
    assert set(made.found.table["plz"]) == set(codes) and made.found.columns["plz"].use == "feature"
    assert made.found.columns["hour"].kind == "number"
    assert said(made, "plz: ") and "such as '0" in said(made, "zero")[0]
    rows = later(tmp_path, made, "plz;hour;size\n01067;07;1\n10115;08;2\n").rows
    assert rows["plz"].tolist() == ["01067", "10115"] and rows["hour"].tolist() == [7, 8]
    many = [f"{one:05d}" for one in RNG.integers(1000, 1200, ROWS)]
    assert drafted(tmp_path, plz=many).group == "" and drafted(tmp_path, dealer=many).group == "dealer"
    with_gaps = drafted(tmp_path, plz=["" if at % 50 == 0 else one for at, one in enumerate(codes)])
    assert set(with_gaps.found.table["plz"].dropna()) == set(codes)


def test_a_newer_file_without_zeros_in_front_fits_a_column_of_codes(tmp_path):
    made = drafted(tmp_path, plz=RNG.choice(["01067", "10115"], ROWS))
    there = Declared(rules(made), {"label": '"late"'})
    again = draft_again(there, "given", written(tmp_path, plz=RNG.choice(["10115", "80331"], ROWS)), "late")
    assert again.found.columns["plz"].kind == "text"


def test_an_empty_text_is_missing_in_one_spelling():
    assert one_spelling(pd.Series([" ", "", "A "])).isna().tolist() == [True, True, False]


def test_limits_that_belong_to_the_other_reading_are_replaced(tmp_path):
    made = drafted(tmp_path, km=[dots(one) for one in WHOLE * 3 + 1000], litres=[dots(one / 10, 1) for one in WHOLE])
    for mark, high in (("", 500), (".", 500_000)):
        old = f'number_column("Driven", {"1000, 500000" if not mark else "1, 450"}, thousands="{mark}")'
        there = Declared(rules(made) | {"km": old}, {"label": '"late"', "task": 'Task("binary", ("no", "yes"))'})
        again = draft_again(there, "given", str(tmp_path / "given.csv"), "late")
        found = Revision(Declared(dict(there.rules), dict(there.parts)))
        found._columns(again)
        (words,) = [one for one in found.changes if "km" in one]
        name, given = rule_arguments(found.proposed.rules["km"])
        assert given["high"] <= high and given["high"] > high / 10 and given["low"] <= high / 450, given
        assert given["thousands"] == mark and given["description"] == "Driven" and "limits of km" in words


def test_wide_limits_of_a_person_stay(tmp_path):
    made = drafted(tmp_path, litres=[dots(one / 10, 1) for one in WHOLE], km=[dots(one) for one in WHOLE])
    wide = {"litres": 'number_column("Litres", 0, 5000000, thousands=".")'}
    wide["km"] = 'number_column("Km", 0, 9000000000, thousands=".")'
    again = draft_again(Declared(rules(made) | wide, {"label": '"late"'}), "given", str(tmp_path / "given.csv"), "late")
    found = Revision(Declared(rules(made) | wide, {"label": '"late"'}))
    found._columns(again)
    assert found.changes == []


def test_rows_that_spelling_makes_one_are_on_one_side(tmp_path):
    fuel = np.where(np.arange(ROWS) % 2, "Diesel", "diesel ")
    size, late = np.arange(ROWS) // 2, np.where(np.arange(ROWS) // 2 % 3, "yes", "no")
    table = pd.DataFrame({"fuel": fuel, "size": size * 1.5, "late": late})
    table.to_csv(tmp_path / "given.csv", index=False)
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "late")
    one = replace(recipe(made), clean=lambda rows: rows.assign(fuel=one_spelling(rows["fuel"])))
    rows = clean_rows(one, read_delivery(one, str(tmp_path / "given.csv")).rows)
    parts = split_rows(one, rows)
    assert (parts.groupby(["fuel", "size"])["part"].nunique() == 1).all() and parts["row"].nunique() == ROWS / 2
    held = parts[parts["part"] == "holdout"]
    assert abs(len(held) / ROWS - made.split().holdout) < 0.08


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        (["5 mW", "5 MW", "7 mW", "9 MW"], True),
        (["vw", "VW", "Audi", "Opel"], True),
        (["Petrol", "petrol", "gas", "none"], True),  # as frequent: two sources of data may mean two things
        ([*["petrol"] * 8, "Petrol", "gas"], False),
        ([*["Diesel AG"] * 8, "diesel ag", "gas"], False),
        (["mW", "mW ", "gas", "none"], False),
    ],
)
def test_capitals_that_may_carry_a_meaning_are_kept_and_asked_about(tmp_path, values, asked):
    size = RNG.normal(size=ROWS).round(6)  # rows that differ, since copies are kept once
    made = drafted(tmp_path, unit=[values[one % len(values)] for one in RNG.permutation(ROWS)], measured=size)
    (words,) = said(made, "differ only in capitals and blanks")
    assert (made.values("team.given", "")["spelled"] == "") == asked
    assert ("and stay apart. If they are one, write rows.assign(unit=" in words) == asked
    assert ("makes them one" in words) == (not asked)


PRICES = RNG.lognormal(9, 1, ROWS).round(2).clip(500, 90_000)


@pytest.mark.parametrize(
    ("price", "scale", "words"),
    [
        (np.where(np.arange(ROWS) % 25, PRICES, -999), "linear", 'once -999 is among its blanks, write scale="log"'),
        (np.where(np.arange(ROWS) % 25, PRICES, 99_999_999), "log", "log(1 + price) is learned"),
        (np.where(np.arange(ROWS) % 25, RNG.normal(50_000, 9000, ROWS).round(), 99_999_999), "linear", ""),
    ],
)
def test_placeholders_do_not_decide_on_the_scale_of_a_target(tmp_path, price, scale, words):
    written(tmp_path, price=price)
    made = draft_pipeline("given", str(tmp_path / "given.csv"), "price")
    assert made.task.scale == scale and bool(said(made, "log(1 + price)")) == bool(words) and said(made, words)
    assert said(made, "if it means unknown")


def test_what_is_said_of_the_scale_is_what_the_recipe_has(tmp_path):
    written(tmp_path, price=PRICES)
    source = str(tmp_path / "given.csv")
    made = draft_pipeline("given", source, "price")
    assert said(made, "log(1 + price) is learned")
    for task, expected in (('Task("regression")', []), ('Task("regression", scale="log")', ["as the recipe says"])):
        there = Declared(rules(made), {"label": '"price"', "task": task})
        told = said(draft_again(there, "given", source, "price"), "log(1 + price)")
        assert [one.partition(", ")[2] for one in told] == expected


def test_a_feature_that_clean_makes_changes_no_identity_of_rows():
    "`row_id`, and with it the side of the split, comes from what came in"
    with_own = diamonds.contract().add_columns({"carat_per_mm": number_column("Carat for each mm", made=True)})
    assert replace(diamonds, contract=lambda: with_own).telling == diamonds.telling


def test_names_of_columns_are_identifiers_whatever_signs_they_have():
    names = plain_names(["Wohnfläche (m²)", "Volumen m³", "½ Preis", "Nº", "Größe", "2. Straße", "Δx"], "homes.csv")
    assert [name for name in names.values() if not name.isidentifier()] == []
    assert names["Wohnfläche (m²)"] == "wohnfläche_m2"


def test_missing_values_are_said(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(400, 3)).round(3), columns=["load", "heat", "speed"])
    table["fails"] = (table["load"] > 0).astype(int)
    table.loc[::10, "load"] = np.nan
    table.to_csv(tmp_path / "machines.csv", index=False)
    notes = draft_pipeline("machines", str(tmp_path / "machines.csv"), "fails").notes
    words = "values are missing of load (10.0%): they may be in later rows, too; of other columns they may not"
    assert [note for note in notes if "missing" in note] == [f"{words} (nullable=True in the contract)"]


def test_blanks_behind_separators_belong_to_no_name(tmp_path):
    (tmp_path / "given.csv").write_text(
        "Age, Chest pain, left\n" + "".join(f"{one}, {one % 7}, no\n" for one in range(30))
    )
    found = read_table(str(tmp_path / "given.csv"))
    assert found.names == {"Age": "age", "Chest pain": "chest_pain", "left": "left"}
    assert found.table["left"].unique().tolist() == ["no"] and found.table["chest_pain"].max() == 6
