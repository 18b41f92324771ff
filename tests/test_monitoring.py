"""False alarms are rare and the alarm fires when it should, on the flights of 2013; also windows in any state.

A page can show one false alarm or none, but not how rare they are. Whether figures stay the same with another number
of threads takes another process to see.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

from mlpkg.data.arrivals import Arrival, note_taken
from mlpkg.data.inputs import Input, inputs_from
from mlpkg.data.lake import Lake
from mlpkg.data.upkeep import tidy_lake
from mlpkg.examples.flights import categorical, clean, features_contract, flight_features, numeric, seed_lake, split
from mlpkg.examples.flights_data import months, read_planes, read_source, read_weather
from mlpkg.models.dependence import unseen_splits
from mlpkg.models.intervals import estimates, z_95
from mlpkg.models.registry import Loaded, Version
from mlpkg.models.scoring import probability
from mlpkg.models.tasks import yes_no
from mlpkg.models.training import fit
from mlpkg.monitoring.checks import Finding, calibration_moves, check_columns, check_joint
from mlpkg.monitoring.dealing import chances, draw_rows, level_shares
from mlpkg.monitoring.drift import (
    column_drift,
    joint_drift,
    missing_drift,
    number_drift,
    prediction_drift,
    text_drift,
)
from mlpkg.monitoring.estimation import _jackknife_error, _unseen_folds, check_expected
from mlpkg.monitoring.performance import check_brier, check_performance, check_positive_rate, leading
from mlpkg.monitoring.report import (
    Report,
    _number_blocks,
    as_rows,
    monitor,
    read_history,
    store,
    with_history,
)
from mlpkg.monitoring.retraining import last_alarm
from mlpkg.monitoring.traffic import read_served, served_window, watch_traffic
from mlpkg.monitoring.verdict import judge_model, judge_rows
from mlpkg.monitoring.windows import Window
from mlpkg.settings import MonitoringSettings

RULES = MonitoringSettings()


def day(table: pd.DataFrame) -> pd.Series:
    return table["month"] + "-" + table["day"].astype(str)


class Flights:
    "August to December, with a champion that learned from August and September and was judged on October"

    def __init__(self):
        wanted = months("2013-08..2013-12")
        self.table = clean(read_source("package", wanted), read_weather(wanted), read_planes())
        parts = split(self.table, "2013-10")
        train, held = parts[parts["part"] != "holdout"], parts[parts["part"] == "holdout"]
        self.pipeline = fit("hist_gradient_boosting", train, "late", numeric, categorical)
        self.inputs = inputs_from(features_contract(), train, flight_features)
        self.learned = Window(parts, y=parts["late"], blocks=day(parts))
        self.held = self.predicted(held)

    def predicted(self, rows: pd.DataFrame) -> Window:
        return Window(rows, probability(self.pipeline, rows), rows["late"], day(rows))

    def month(self, name: str) -> Window:
        return self.predicted(self.table[self.table["month"] == name])

    def judge(self, current: Window, learned: Window | None = None, **given) -> Report:
        return monitor(learned or self.learned, current, self.inputs, RULES, self.held, **given)


@pytest.fixture(scope="module")
def flights() -> Flights:
    return Flights()


def test_the_alarm_fires_in_december(flights):
    october, december = flights.month("2013-10"), flights.month("2013-12")
    for learned in (october, flights.learned):
        report = flights.judge(december, learned, slices=["origin"], window="2013-12")
        assert report.alarm
        assert report.get("performance", "calibration").level == "alarm"
        assert "positive rate 32.6%, predicted" in report.verdict
        assert report.drifted[:2] == ["temp", "dewp"]
    for unknown in ({"y": None}, {"y": None, "p": None}):
        report = flights.judge(replace(december, **unknown), october, window="2013-12")
        assert not report.alarm and report.get("joint", "all columns").level == "warning"
        expected = report.get("expected", "roc_auc")  # winter asks no harder questions; that it answers otherwise
        assert expected is None if "p" in unknown else expected.level != "alarm"  # only truth can show


def test_the_held_out_month_raises_no_alarm(flights):
    report = flights.judge(flights.month("2013-10"), slices=["origin"], window="2013-10")
    assert report.status == "ok" and report.verdict.startswith("No alarm in 2013-10: positive rate")
    assert report.get("performance", "roc_auc").level == "unknown"  # a fall by 0.04 might be missed with thirty days


def dealt(window: Window, number: int, *counts: int):
    "Days dealt at random: of a reference, of held-out rows among them, and of a window"
    labels = pd.factorize(np.asarray(window.blocks))[0]
    for seed in range(number):
        order = np.random.default_rng(seed).permutation(labels.max() + 1)
        learned, held, days = counts
        parts = order[days : days + learned], order[days : days + held], order[:days]
        yield tuple(window.take(np.isin(labels, part)) for part in parts)


def at_most(trials: int, rate: float = 0.05) -> int:
    "Alarms that a true rate does not exceed in 99 of 100 repetitions of all trials"
    return int(stats.binom.ppf(0.99, trials, rate))


@pytest.mark.parametrize(("days", "number"), [(1, 10), (7, 30)])
def test_days_dealt_at_random_raise_few_alarms(flights, days, number):
    "All rows and columns of later months than the model has learned from; `make alarms` measures more of them"
    pool = flights.predicted(flights.table[flights.table["month"] > "2013-09"].dropna(subset="late"))
    alarms = 0
    for learned, held, window in dealt(pool, number, 60, 30, days):
        learned, held, window = _number_blocks(learned.at_most(30_000), held, window)
        found = [
            *judge_rows(learned, window, flights.inputs, RULES),
            *judge_model(learned, window, held, flights.inputs, RULES),
        ]
        alarms += any(one.level == "alarm" for one in found)
    assert alarms <= at_most(number)


def daily(seed: int, days: int, columns: int = 30, rows: int = 100, names: bool = False) -> Window:
    "Columns that are empty on some days, each on others; or a text that is another one every day"
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), rows)
    gone = rng.beta(0.3, 0.7, (days, columns))[day] > rng.uniform(size=(len(day), columns))
    table = pd.DataFrame(np.where(gone, np.nan, 1.0), columns=[f"c{i}" for i in range(columns)])
    return Window(table.assign(text=[f"{seed}-{one}" for one in day] if names else "a"), blocks=seed * 1000 + day)


def column_alarms(trials: int, **how) -> int:
    inputs = [*(Input(f"c{i}", "number") for i in range(30)), Input("text", "text")]
    alarms = 0
    for seed in range(trials):
        learned, window = _number_blocks(daily(2 * seed + 1, 40, **how), daily(2 * seed + 2, 7, **how))
        found = judge_rows(learned, window, inputs, RULES)
        alarms += any(one.level == "alarm" for one in found)
    return alarms


def test_many_columns_raise_no_more_alarms_than_one():
    assert column_alarms(40) <= at_most(40)


def test_a_text_that_is_new_every_day_raises_no_alarm():
    assert column_alarms(5, columns=30, names=True) == 0


def test_a_text_that_is_new_every_day_hides_no_missing_values():
    learned, window = _number_blocks(daily(1, 40, columns=1, names=True), daily(2, 7, columns=1, names=True))
    learned = replace(learned, rows=learned.rows.assign(weight=5.0))
    found = []
    for weight in (5.0, np.nan):
        now = replace(window, rows=window.rows.assign(weight=weight))
        found += check_columns(learned, now, [Input("weight", "number"), Input("text", "text")], RULES)
    assert [one.level for one in found if (one.check, one.column) == ("missing", "weight")] == ["ok", "alarm"]


def test_a_column_that_is_empty_for_once_raises_the_alarm_on_a_single_day():
    learned, day = daily(1, 120), daily(2, 1)
    learned, day = (replace(one, rows=one.rows.assign(weight=5.0)) for one in (learned, day))
    gone = replace(day, rows=day.rows.assign(weight=np.nan))
    found = [check_columns(learned, one, [Input("weight", "number")], RULES) for one in (day, gone)]
    assert [one.level for some in found for one in some if one.check == "missing"] == ["ok", "alarm"]


def scored(seed: int, days: int, rows: int) -> Window:
    "Days of some rows each, with predictions that are right"
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(-1.3, 0.8, days * rows)))
    table = pd.DataFrame({"c0": p})
    return Window(table, p, rng.uniform(size=len(p)) < p, 1000 * seed + np.arange(len(p)) // rows)


def test_small_days_beside_large_ones_raise_few_alarms():
    "As for an API that is asked little each day, or where the truth has come for a few rows of each day"
    alarms = 0
    for seed in range(24):
        held, window = scored(2 * seed + 1, 30, 150), scored(2 * seed + 2, 7, 15)
        alarms += any(one.level == "alarm" for one in check_performance("binary", held, window, (), RULES))
    assert alarms <= at_most(24)


def test_few_held_out_rows_beside_a_large_window_raise_few_alarms():
    "As of a table of 300 rows, whose model is asked ten thousand times"
    alarms = 0
    for seed in range(40):
        held, window = (replace(scored(2 * seed + one, 1, rows), blocks=None) for one, rows in ((1, 90), (2, 30_000)))
        alarms += any(one.level == "alarm" for one in check_performance("binary", held, window, (), RULES))
    assert alarms <= at_most(40)


def stormy(rng: np.random.Generator, sizes: list[int]) -> Window:
    "Days of these sizes, each with a rate of its own that no model foresees"
    day = np.repeat(np.arange(len(sizes)), sizes)
    p = 1 / (1 + np.exp(-rng.normal(-1.0, 0.8, len(day))))
    moved = 1 / (1 + np.exp(-np.log(p / (1 - p)) - rng.normal(0, 0.6, len(sizes))[day]))
    return Window(pd.DataFrame({"c0": p}), p, (rng.uniform(size=len(day)) < moved) * 1.0, day)


def test_a_day_of_a_campaign_raises_few_alarms():
    "One day with fifty times the requests of the others: a window of one day in truth, which is dealt as seven"
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        held, window = stormy(rng, [800] * 30), stormy(rng, [5000, *[100] * 6])
        window = replace(window, blocks=100 + window.blocks)
        alarms += any(one.level == "alarm" for one in check_performance("binary", held, window, (), RULES))
    assert alarms <= at_most(40)


def visited(seed: int, days: range, customers: range, by_day: float, by_customer: float) -> Window:
    "Customers who come on most days; days and customers have rates of their own that no model foresees"
    rng = np.random.default_rng(seed)
    n, x = 60 * len(days), rng.normal(size=60 * len(days))
    day, customer = rng.integers(days.start, days.stop, n), rng.integers(customers.start, customers.stop, n)
    off = rng.normal(0, by_day, 200)[day] + rng.normal(0, by_customer, 200)[customer]
    p = 1 / (1 + np.exp(1 - x / (1 + 0.35 * (by_day**2 + by_customer**2)) ** 0.5))
    y = rng.uniform(size=n) < 1 / (1 + np.exp(1 - x - off))
    rows = pd.DataFrame({"c0": x, "of_whom": x + off, "size": np.where(x + off > 0.5, "large", "small")})
    return Window(rows, p, y, pd.DataFrame({"block": day, "customer": customer}))


def new_customers(seed: int, by_day: float, by_customer: float) -> list[Window]:
    "Two months and the next one, with customers of their own, in which nothing else has changed"
    before = visited(2 * seed + 1, range(60), range(80), by_day, by_customer)
    return _number_blocks(before, visited(2 * seed + 2, range(60, 90), range(80, 160), by_day, by_customer))


def days_alone(*windows: Window) -> list[Window]:
    "What is left where nothing is known of the customers"
    return [replace(one, blocks=one.blocks[["block"]]) for one in windows]


@pytest.mark.parametrize(("by_day", "by_customer"), [(0.0, 0.9), (0.6, 0.0), (0.3, 0.6)])
def test_days_and_customers_are_not_taken_for_a_change(by_day, by_customer):
    "New customers come on all the days of a month: days alone say nothing of how they differ, nor they of days"
    found = {"day": 0, "customer": 0, "both": 0}
    for seed in range(60):
        held = visited(2 * seed + 1, range(60), range(80), by_day, by_customer)
        window = visited(2 * seed + 2, range(60, 90), range(80, 160), by_day, by_customer)
        pairs = {
            "day": [replace(one, blocks=one.blocks["block"]) for one in (held, window)],
            "customer": [replace(one, blocks=one.blocks["customer"]) for one in (held, window)],
            "both": [held, window],
        }
        for name, (old, new) in pairs.items():
            moves = old.moves_to(new, lambda deals: calibration_moves(deals, held, window)[:, None])  # noqa: B023
            found[name] += chances(moves, [RULES.calibration], 0.05)[0].p < 0.05
    assert found["both"] <= at_most(60)
    assert found["customer"] > at_most(60) or by_customer, "or the example shows nothing"
    assert found["day"] > at_most(60) or by_day


def two_tables(seed: int, by_day: float, days: int, customers: int = 0, by_customer: float = 0.0) -> list[Window]:
    "Sixty days and some more, with columns that vary by day and by customers who return, and nothing has changed"
    rng, made = np.random.default_rng(seed), []
    for count, first in ((60, 0), (days, 1000)):
        day = np.repeat(np.arange(count), 60)
        x = rng.normal(size=len(day)) + rng.normal(0, by_day, count)[day]
        blocks = pd.DataFrame({"block": first + day})
        if customers:
            customer = rng.integers(0, customers, len(day))
            x, blocks = x + rng.normal(0, by_customer, customers)[customer], blocks.assign(customer=first + customer)
        size = np.searchsorted([-0.8, -0.25, 0.25, 0.8], x).astype(str)
        rows = pd.DataFrame({"x": x, "size": size, "gone": np.where(x > 0.5, np.nan, 1.0)})
        made.append(Window(rows, 1 / (1 + np.exp(-x)), None, blocks))
    return made


@pytest.mark.parametrize(
    ("by_day", "days", "customers", "by_customer"),
    [(0.5, 30, 0, 0.0), (0.5, 7, 0, 0.0), (0.5, 3, 0, 0.0), (0.3, 30, 80, 0.6), (0.0, 30, 80, 0.9)],
)
def test_p_values_of_drift_are_right_where_days_and_customers_return(by_day, days, customers, by_customer):
    "Of numbers, texts, missing values and predictions; formulas found up to a third of them drifted"
    hits = {"columns": 0, "predictions": 0}
    for seed in range(60):
        before, now = two_tables(seed, by_day, days, customers, by_customer)
        table = column_drift(before.rows, now.rows, list(before.rows), (before.blocks, now.blocks))
        hits["columns"] += min(table["p_value"].min(), table["missing_p"].min()) < 0.05
        hits["predictions"] += prediction_drift(before.p, now.p, (before.blocks, now.blocks))["p_value"] < 0.05
    assert max(hits.values()) <= at_most(60), hits


def test_a_real_change_of_a_column_is_found():
    "With thirty days, and with two beside sixty; among forty columns, too"
    for days in (30, 2):
        found = 0
        for seed in range(20):
            before, now = two_tables(seed, 0.3, days)
            noise = np.random.default_rng(seed).normal(size=(2, len(before.rows), 40))
            tables = [
                one.rows[["x"]].assign(**{f"c{i}": noise[side, : len(one.rows), i] for i in range(40)})
                for side, one in enumerate((before, now))
            ]
            tables[1]["x"] += 2
            table = column_drift(*tables, list(tables[0]), (before.blocks, now.blocks)).set_index("column")
            found += table.loc["x", "p_value"] < 0.05 and table.loc["x", "psi"] > 0.2
        assert found == 20, days


def test_columns_with_an_event_of_one_day_hide_no_change_of_another():
    "A day on which a column was missing is a rare deal, and says nothing of the others"
    found = 0
    for seed in range(20):
        rng, day = np.random.default_rng(seed), np.repeat(np.arange(67), 60)
        old = day < 60
        x = rng.normal(size=len(day)) + rng.normal(0, 0.3, 67)[day] + 1.0 * ~old
        table = pd.DataFrame(
            {"x": x} | {f"c{i}": np.where(day == i, np.nan, rng.normal(size=len(day))) for i in (1, 2)}
        )
        moved = column_drift(table[old], table[~old], list(table), (day[old], day[~old])).set_index("column")
        found += moved.loc["x", "p_value"] < 0.05
    assert found == 20


def test_a_column_that_varies_by_day_hides_no_small_change_of_a_steady_one():
    "Each column is measured by its usual move: a pressure moves little, beside temperatures that move a lot"
    found = 0
    for seed in range(20):
        rng, day = np.random.default_rng(seed), np.repeat(np.arange(90), 60)
        old = day < 60
        table = pd.DataFrame({f"t{i}": rng.normal(size=90)[day] + 0.1 * rng.normal(size=len(day)) for i in range(5)})
        table["pressure"] = rng.normal(size=len(day)) + 0.2 * ~old
        moved = column_drift(table[old], table[~old], list(table), (day[old], day[~old])).set_index("column")
        found += moved.loc["pressure", "p_value"] < 0.05
    assert found == 20


def towns(seed: int, count: int, days: int, first: int, share: float = 1.0) -> Window:
    "Sixty customers who each have a town of their own, on a share of their visits"
    rng, day = np.random.default_rng(seed), np.repeat(np.arange(days), 60)
    customer, town = rng.integers(0, 60, len(day)), rng.integers(0, count, 60)
    named = np.where(rng.uniform(size=len(day)) < share, town[customer], rng.integers(0, count, len(day)))
    blocks = pd.DataFrame({"block": first + day, "customer": first + customer})
    return Window(pd.DataFrame({"town": named.astype(str)}), None, None, blocks)


@pytest.mark.parametrize(
    ("count", "share", "left"), [(200, 1.0, None), (50, 1.0, 0), (50, 0.5, 0), (50, 0.5, 1)]
)  # fmt: skip
def test_what_belongs_to_customers_is_not_taken_for_a_change_where_others_come(count, share, left):
    warned = 0
    for seed in range(30):
        windows = [towns(2 * seed, count, 60, 0, share), towns(2 * seed + 1, count, 30, 1000, share)]
        before, now = windows if left is None else knowing_less(left, windows, "block")
        warned += text_drift(before.rows["town"], now.rows["town"], (before.blocks, now.blocks))["p_value"] < 0.05
    assert warned <= at_most(30)


@pytest.mark.parametrize("left", [None, 0, 1])
@pytest.mark.parametrize("count", [150, 1_000_000])
def test_new_towns_of_new_customers_raise_no_alarm(left, count):
    "Whether both windows know the customers or one of them, and whether a town has one customer or several"
    alarms = 0
    for seed in range(10):
        windows = [towns(2 * seed, count, 60, 0), towns(2 * seed + 1, count, 30, 1000)]
        before, now = windows if left is None else knowing_less(left, windows, "block")
        found = judge_rows(before, now, [Input("town", "text")], RULES)
        alarms += any(one.level == "alarm" for one in found)
    assert alarms <= at_most(10)


def rare_visits(seed: int, customers: int, days: int, first: int) -> Window:
    "Customers with a town each, of whom many come once: new towns come with new customers"
    rng, rows = np.random.default_rng(seed), 40 * days
    day, customer = np.arange(rows) % days, rng.integers(0, customers, rows)
    blocks = pd.DataFrame({"block": first + day, "customer": first + customer})
    return Window(pd.DataFrame({"town": [f"{first} {one}" for one in customer]}), None, None, blocks)


@pytest.mark.parametrize("left", [None, 0])
@pytest.mark.parametrize("customers", [300, 3000])
def test_towns_of_customers_who_come_once_are_not_values_that_are_new_in_each_row(left, customers):
    "In a week most come once, where in three months they return: nothing but the length of the window has changed"
    windows = [rare_visits(1, 300, 90, 0), rare_visits(2, customers, 7, 1000)]
    before, now = windows if left is None else knowing_less(left, windows, "block")
    found = judge_rows(before, now, [Input("town", "text")], RULES)
    assert all(one.level != "alarm" for one in found)


def with_numbers(window: Window, share: float) -> Window:
    "Numbers of orders, in the place of towns, in a share of the rows"
    rows = np.arange(len(window.rows))
    town = window.rows["town"].where(rows % 10 >= 10 * share, [f"order {one}" for one in rows])
    return replace(window, rows=window.rows.assign(town=town))


@pytest.mark.parametrize(
    ("share", "left", "level"),
    [(1.0, None, "alarm"), (0.5, None, "alarm"), (1.0, 0, "alarm"), (0.5, 0, "alarm"), (0.5, 1, "unknown")],
)
@pytest.mark.parametrize("count", [150, 1_000_000])
def test_values_that_are_new_in_each_row_raise_the_alarm_although_customers_are_new(share, left, level, count):
    "Unless the window does not know its customers: of these, too, each may have a town of its own, and come once"
    windows = [towns(0, count, 60, 0), with_numbers(towns(1, count, 30, 1000), share)]
    before, now = windows if left is None else knowing_less(left, windows, "block")
    found = judge_rows(before, now, [Input("town", "text")], RULES)
    assert [one.level for one in found if one.check == "new values"] == [level]


def noted(seed: int, days: int, rows: int, customers: int, first: int) -> Window:
    "Customers who come on any day, and leave a note, which nobody else writes, on six of ten visits"
    rng, day = np.random.default_rng(seed), np.repeat(np.arange(days), rows)
    notes = [f"note {first} {one}" for one in range(len(day))]
    note = np.where(rng.uniform(size=len(day)) < 0.6, notes, "none")
    blocks = pd.DataFrame({"block": first + day, "customer": rng.integers(0, customers, len(day))})
    return Window(pd.DataFrame({"note": note, "size": rng.normal(size=len(day))}), None, None, blocks)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((90, 700, 6000), (14, 700, 6000)),
        ((60, 60, 10_000), (30, 60, 60)),
        ((60, 60, 100_000), (30, 60, 60)),
    ],
)
def test_how_often_customers_come_is_not_taken_for_values_that_are_new_in_each_row(before, now):
    "A sample of the reference has most customers once, where the window has all their visits; or they came less often"
    for seed in range(3):
        windows = [noted(2 * seed, *before, 0).at_most(3000), noted(2 * seed + 1, *now, 1000)]
        found = judge_rows(*windows, [Input("note", "text")], RULES)
        assert [one.level for one in found if one.check == "new values"] == ["warning"]


def test_new_values_on_a_few_days_allow_no_conclusion():
    windows = [replace(one, blocks=one.blocks["block"] % 3) for one in (towns(0, 50, 60, 0), towns(1, 50, 30, 0))]
    windows[1] = replace(with_numbers(windows[1], 0.5), blocks=10 + windows[1].blocks)
    found = judge_rows(*windows, [Input("town", "text")], RULES)
    assert [one.level for one in found if one.check == "new values"] == ["unknown"]


def test_the_brier_score_of_one_day_concludes_nothing():
    for seed in range(5):
        held, day = scored(2 * seed, 30, 600), scored(2 * seed + 1, 1, 600)
        shuffled = replace(day, p=np.random.default_rng(seed).permutation(day.p))
        assert [check_brier(held, one, RULES).level for one in (day, shuffled)] == ["unknown", "unknown"]


@pytest.mark.parametrize(("days", "level"), [(2, "unknown"), (20, "warning")])
def test_a_brier_score_that_is_much_worse_on_few_days_is_not_within_bounds(days, level):
    "By 0.2, where half of the days before were as bad: of two days nobody can say whether that is chance"

    def window(rates: list[float], first: int) -> Window:
        day = np.repeat(np.arange(len(rates)), 100)
        y = np.arange(len(day)) % 100 < 100 * np.array(rates)[day]
        return Window(pd.DataFrame({"size": day}), 0.0 * day, y * 1.0, first + day)

    found = check_brier(window([0.1, 0.5] * 10, 0), window([0.5] * days, 100), RULES)
    assert found.value - found.reference == pytest.approx(0.2) and found.level == level


def test_deals_that_say_nothing_of_a_column_do_not_make_its_move_rare():
    "It was measured on three days of sixty, and on one of the window's two"
    drifted = 0
    for seed in range(100):
        rng, day = np.random.default_rng(seed), np.repeat(np.arange(62), 60)
        x = rng.normal(size=len(day)) + rng.normal(0, 0.5, 62)[day]
        x[~np.isin(day, [*rng.choice(60, 3, replace=False), 61])] = np.nan
        old, x = day < 60, pd.Series(x)
        drifted += number_drift(x[old], x[~old], (day[old], day[~old]))["p_value"] < 0.05
    assert drifted <= at_most(100)


def test_the_correction_of_the_stability_index_does_not_take_a_real_change_for_chance():
    "On one day beside one, and on many, the index of the same change is about the same"
    rng, index = np.random.default_rng(0), []
    for days in (1, 2, 5, 50):
        before, now = (pd.Series(rng.normal(shift, 1, 10_000)) for shift in (0, 0.8))
        day = np.arange(10_000) % days
        index.append(number_drift(before, now, (day, day))["psi"])
    assert max(index) < 1.15 * min(index) and min(index) > 0.5, index


def drifts(before: Window, now: Window) -> bool:
    "Does a column drift that tells what customers are like, by any amount?"
    found = check_columns(before, now, [Input("size", "text")], MonitoringSettings(psi=1e-6))
    return found[0].level == "warning"


def told_apart(before: Window, now: Window) -> bool:
    "Does a classifier tell the new rows from the old ones?"
    rules = MonitoringSettings(joint_auc=0.501)
    return check_joint(before, now, [Input("of_whom", "number")], rules).level == "warning"


def more_positives(before: Window, now: Window) -> bool:
    "Has the positive rate changed, by any amount?"
    return check_positive_rate(before, now, MonitoringSettings(calibration=1e-6)).level == "warning"


@pytest.mark.parametrize(("changed", "trials"), [(more_positives, 30), (drifts, 30), (told_apart, 20)])
def test_no_warning_forgets_that_customers_return(changed, trials):
    "Whatever is warned of at a level of 5 % counts along days and customers, as alarms do"
    both, alone = 0, 0
    for seed in range(trials):
        windows = new_customers(seed, 0.0, 0.9)
        both, alone = both + changed(*windows), alone + changed(*days_alone(*windows))
    assert both <= at_most(trials)
    assert alone > at_most(trials), "or the example shows nothing"


def test_no_interval_forgets_that_customers_return():
    before, now = new_customers(0, 0.0, 0.9)
    inputs = [Input("of_whom", "number")]

    def widths(*windows: Window) -> dict[str, float]:
        found = judge_model(*windows, windows[0], inputs, RULES)
        found += [check_expected(kind, *windows, inputs, RULES) for kind in ("binary", "multiclass", "regression")]
        found += check_performance("regression", *windows, (), RULES)
        named = {f"{place} {one.check} {one.column}": one.high - one.low for place, one in enumerate(found)}
        return {name: width for name, width in named.items() if np.isfinite(width)}

    both, alone = widths(before, now), widths(*days_alone(before, now))
    assert set(both) == set(alone) and len(both) > 8
    wider = {name for name in both if both[name] > 1.1 * alone[name]}
    assert all(both[name] > 0.999 * alone[name] for name in both)
    assert {name.split(" ", 1)[1] for name in wider} >= {"truth share", "performance calibration", "performance bias"}


@pytest.mark.parametrize(("days", "known"), [(3, False), (4, False), (7, True)])
def test_few_days_are_not_taken_for_a_change_of_all_columns_together(days, known):
    "Of days and customers, and of days alone: four days may differ from forty others by chance alone"
    warned = {"both": 0, "day": 0}
    for seed in range(30):
        rng, made = np.random.default_rng(seed), []
        for count, first in ((40, 0), (days, 1000)):
            day, customer = np.repeat(np.arange(count), 60), rng.integers(0, 40, 60 * count)
            by_day, by_customer = rng.normal(size=(count, 2))[day], rng.normal(size=(40, 2))[customer]
            rows = pd.DataFrame(np.hstack([by_day, by_customer]), columns=list("abef"))
            rows += 0.1 * rng.normal(size=rows.shape)
            made.append((rows, pd.DataFrame({"block": first + day, "customer": first + customer})))
        (old, before), (new, now) = made
        found = {
            "both": joint_drift(old, new, list("abef"), (before, now)),
            "day": joint_drift(old, new, list("ab"), (before["block"], now["block"])),
        }
        assert known == all(np.isfinite(one.low) for one in found.values())
        warned = {name: count + (found[name].auc > 0.8 and found[name].low > 0.5) for name, count in warned.items()}
    assert max(warned.values()) <= at_most(30), warned


@pytest.mark.parametrize("days", [2, 7])
def test_the_brier_score_of_few_days_is_not_worse_by_chance(days):
    worse = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        held, window = stormy(rng, [200] * 40), stormy(rng, [200] * days)
        worse += check_brier(held, replace(window, blocks=100 + window.blocks), RULES).level == "warning"
    assert worse <= at_most(60)


def test_an_auc_is_never_more_certain_by_days_and_customers_than_by_one_of_them():
    "Near 1, where an interval that was cut would be the narrower one"
    for seed in range(10):
        draw = np.random.default_rng(seed)
        y, ways = (np.arange(120) % 10 == 0) * 1, pd.DataFrame(draw.integers(0, [8, 10], (120, 2)))
        effect = sum(draw.normal(0, 0.7, 10)[ways[way]] for way in ways)
        p = 1 / (1 + np.exp(-((y - 0.5) * 4.5 + draw.normal(size=120) + effect)))
        both, *alone = (estimates(y, p, blocks)["roc_auc"].error for blocks in (ways, ways[[0]], ways[[1]]))
        assert both >= 0.999 * max(alone)


@pytest.mark.parametrize(("days", "level"), [(2, "unknown"), (3, "unknown"), (20, "warning")])
def test_a_rate_that_moves_far_on_few_days_is_not_within_bounds(days, level):
    def window(rate: float, first: int) -> Window:
        rows = 100 * days
        day = first + np.arange(rows) % days
        y = (np.random.default_rng(first).uniform(size=rows) < rate) * 1.0
        return Window(pd.DataFrame({"size": np.arange(rows)}), blocks=day, p=y * 0 + 0.2, y=y)

    assert check_positive_rate(window(0.2, 0), window(0.8, 100), RULES).level == level


def test_rows_whose_block_is_not_known_are_blocks_by_themselves():
    one = Window(pd.DataFrame({"size": range(4)}), blocks=np.array(["a", None, "b", None], dtype=object))
    before, now = _number_blocks(one, one)
    places = [*before.blocks["block"], *now.blocks["block"]]
    assert places[0] == places[4] and places[2] == places[6] and len(set(places)) == 6


@pytest.mark.parametrize(("days", "folds"), [(1, 5), (2, 2), (3, 3), (4, 4), (30, 5)])
def test_the_model_of_errors_is_asked_about_other_days_also_where_there_are_few(days, folds):
    held = replace(scored(1, 1, 600), blocks=np.arange(600) % days)
    splits = list(unseen_splits(_unseen_folds(held, 0)))
    assert len(splits) == folds and sorted(np.concatenate([asked for _, asked in splits])) == [*range(600)]
    shared = [set(held.blocks[learned]) & set(held.blocks[asked]) for learned, asked in splits]
    assert days == 1 or not any(shared)


def priced(seed: int, days: int, rows: int, low: float, high: float, by_day: float, first: int) -> tuple[Window, float]:
    "Numbers whose errors grow with the distance and differ by day, and the mean error that is to be expected of them"
    rng, day = np.random.default_rng(seed), np.repeat(np.arange(days), rows)
    distance = rng.uniform(low, high, len(day))
    scale = np.exp(1.5 * distance) * np.exp(rng.normal(0, by_day, days))[day]
    window = Window(pd.DataFrame({"distance": distance}), 10 * distance, None, first + day)
    truth = float(np.exp(1.5 * distance).mean() * np.sqrt(2 / np.pi) * np.exp(by_day**2 / 2))
    return replace(window, y=window.p + scale * rng.normal(size=len(day))), truth


@pytest.mark.parametrize(("low", "high", "by_day"), [(0.9, 1.0, 0.0), (0.9, 1.0, 0.3), (0.4, 0.5, 0.3)])
def test_the_interval_of_an_expected_error_holds_for_a_part_of_the_rows_too(low, high, by_day):
    """Such as parcels that go far: a tenth of the held-out rows is all that is known of them.

    More than 7 of 30 are missed with a probability of 0.00009 where 95 % are covered, and at most 7 with one of
    0.00002 where only 38 % are.
    """
    missed = 0
    for seed in range(30):
        held, _ = priced(2 * seed, 30, 60, 0.0, 1.0, by_day, 0)
        window, truth = priced(2 * seed + 1, 10, 60, low, high, by_day, 100)
        found = check_expected("regression", held, window, [Input("distance", "number")], RULES)
        missed += not found.low <= truth <= found.high
    assert missed <= 7


@pytest.mark.parametrize("folds", [(5,), (2,), (3, 3), (2, 4), (2, 2, 2), (3, 3, 3)])
def test_the_error_of_what_is_learned_counts_each_way_in_which_rows_depend(folds):
    "The mean of rows with effects of 60 blocks in each way, beside which those of single rows are small"
    ways, errors, off = len(folds), [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 60, (ways, 2400))
        x = sum(rng.normal(0, 0.3, 60)[one] for one in blocks) + rng.normal(0, 0.1, 2400)
        fold = [rng.permutation(60)[one] % count for one, count in zip(blocks, folds, strict=True)]
        models = [(x[learned].mean(), [one[asked[0]] for one in fold]) for learned, asked in unseen_splits(fold)]
        errors.append(_jackknife_error(*(np.array(one) for one in zip(*models, strict=True))))
        off.append(abs(x.mean()))
    widened = stats.t.isf(0.025, min(folds) - 1) / z_95
    true = np.sqrt(np.mean(np.square(off)))
    assert np.sqrt(np.mean(np.square(errors))) / widened == pytest.approx(true, rel=0.15)
    assert np.mean(np.array(off) < z_95 * np.array(errors)) > 0.92  # 95 % of 400, less what chance allows


def test_where_days_and_customers_leave_nothing_to_learn_from_days_are_all_there_is():
    "Each customer comes on all of two days but one: whom a model has not seen, has not come on a day that it has not"
    held = replace(scored(1, 1, 600), blocks=pd.DataFrame({"day": np.arange(600) % 2, "customer": np.arange(600) % 2}))
    held = replace(
        held,
        blocks=held.blocks.assign(customer=np.where(np.arange(600) < 2, 1 - held.blocks["day"], held.blocks["day"])),
    )
    splits = list(unseen_splits(_unseen_folds(held, 0)))
    assert all(len(learned) for learned, _ in splits)


def test_the_model_of_errors_is_asked_about_days_and_customers_that_it_has_not_seen():
    held = new_customers(0, 0.3, 0.6)[0]
    splits = list(unseen_splits(_unseen_folds(held, 0)))
    assert sorted(np.concatenate([asked for _, asked in splits])) == [*range(len(held.rows))]
    for labels in (held.blocks["block"].to_numpy(), held.blocks["customer"].to_numpy()):
        assert not any(set(labels[learned]) & set(labels[asked]) for learned, asked in splits)


@pytest.mark.parametrize("name", ["unit", "across block", "0"])
def test_what_rows_depend_on_each_other_by_may_have_any_name(name):
    windows = [replace(one, blocks=one.blocks.set_axis(["block", name], axis=1)) for one in new_customers(0, 0.3, 0.6)]
    report = monitor(windows[0], windows[1], [Input("c0", "number")], RULES, windows[0])
    expected = monitor(*new_customers(0, 0.3, 0.6), [Input("c0", "number")], RULES, new_customers(0, 0.3, 0.6)[0])
    pd.testing.assert_frame_equal(report.checks, expected.checks)


def knowing_less(which: int, windows: list[Window], left: str) -> list[Window]:
    "Windows of which one knows its days alone, or its customers"
    return [replace(one, blocks=one.blocks[[left]]) if place == which else one for place, one in enumerate(windows)]


@pytest.mark.parametrize("which", [0, 1])
def test_customers_count_where_one_window_does_not_know_them(which):
    "As where a reference is older than the column that names them: new customers are no change of the world"
    found, none, changed = 0, 0, 0
    for seed in range(60):
        windows = new_customers(seed, 0.0, 0.9)
        found += more_positives(*knowing_less(which, windows, "block"))
        none += more_positives(
            *(replace(one, blocks=None) if place == which else one for place, one in enumerate(windows))
        )
        moved = replace(windows[1], y=np.maximum(windows[1].y, np.random.default_rng(seed).uniform(size=1800) < 0.4))
        changed += more_positives(*knowing_less(which, [windows[0], moved], "block"))
    assert max(found, none) <= at_most(60)
    assert changed > 50, "and a large change is still found"


def test_days_count_where_one_window_knows_customers_alone():
    alone = 0
    for seed in range(40):
        windows = new_customers(seed, 0.6, 0.0)
        alone += more_positives(*knowing_less(0, windows, "customer"))
    assert alone <= at_most(40)


def test_the_only_store_says_nothing_of_how_rows_depend_on_each_other():
    "A column with one value in all windows, which would make every check unknown"
    plain = new_customers(0, 0.3, 0.6)
    stored = [replace(one, blocks=one.blocks.assign(store="A")) for one in plain]
    inputs = [Input("c0", "number")]
    expected, report = (monitor(*windows, inputs, RULES, windows[0]) for windows in (plain, stored))
    about = ["check", "column", "level"]
    pd.testing.assert_frame_equal(report.checks[about], expected.checks[about])
    assert report.status == "ok" and report.get("drift", "c0").level == "ok"


def test_a_report_that_concludes_nothing_does_not_say_that_all_is_well():
    "Two stores cannot show how stores differ; that no row breaks the contract says nothing of it"
    plain = [replace(one, rows=one.rows.assign(c1=1.0)) for one in new_customers(0, 0.3, 0.6)]
    two = [
        replace(one, blocks=pd.DataFrame({"store": place + np.zeros(len(one.rows))})) for place, one in enumerate(plain)
    ]
    report = monitor(*two, [Input("c0", "number"), Input("c1", "number")], RULES, two[0])
    assert report.get("contract", "rows").level == "ok"
    assert report.status == "unknown" and ": no conclusion, " in report.verdict


def test_what_one_day_says_of_a_model_may_be_chance():
    "The figure is reported, without a verdict; a failure that is found in many days is an alarm"
    many = np.arange(6000) // 160  # thirty-eight days, of which one may be the worst by chance
    held = replace(parcels(6000, 1), blocks=many)
    for days, level in ((1, "unknown"), (30, "alarm")):
        bad = replace(parcels(6000, 2), blocks=100 + np.arange(6000) % days)
        bad = replace(bad, y=np.where(np.random.default_rng(0).uniform(size=6000) < 0.3, 1.0, bad.y))
        found = judge_model(held, bad, held, INPUTS, RULES)
        calibration = next(one for one in found if one.column == "calibration")
        assert calibration.level == level
        assert calibration.value < -0.1 and np.isfinite(calibration.low) == (days > 1)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_window_that_is_too_small_for_a_verdict_still_reports_its_figure(kind):
    for rows, known in ((40, 40), (1500, 40)):
        window = parcels().take(np.arange(rows))
        window = replace(window, y=np.where(np.arange(rows) < known, window.y, np.nan))
        found = judge(window, kind=kind).get("performance", leading[kind])
        assert found.level == "unknown" and np.isfinite(found.value) and np.isnan(found.low)


def test_the_stability_index_does_not_depend_on_the_number_of_rows():
    rng = np.random.default_rng(0)
    for rows in (50, 500, 5000):
        pairs = [pd.Series(rng.normal(size=rows)) for _ in range(60)]
        found = [number_drift(one, other)["psi"] for one, other in zip(pairs[::2], pairs[1::2], strict=True)]
        assert np.mean(found) < 0.1  # noise is cut off at zero; without the correction 0.36 of fifty rows


# Windows in any state, on small tables

INPUTS = [
    Input("weight", "number", low=0, high=500),
    Input("distance", "number", low=0, high=1000, nullable=False),
    Input("carrier", "text", categories=("blue", "red")),
]


def parcels(rows: int = 1500, seed: int = 0) -> Window:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"weight": rng.gamma(2, 3, rows), "distance": rng.uniform(5, 900, rows)})
    table["carrier"] = rng.choice(["blue", "red"], rows)
    p = 1 / (1 + np.exp(3.5 - table["distance"] / 300))
    return Window(table, p, (rng.uniform(size=rows) < p).astype(float))


def judge(window: Window, learned: Window | None = None, rules: MonitoringSettings = RULES, **given) -> Report:
    return monitor(learned or parcels(seed=1), window, INPUTS, rules, parcels(seed=2), window="2024-05", **given)


@pytest.mark.parametrize("rows", [0, 1, 499])
def test_too_few_rows_allow_no_conclusion(rows):
    for window, learned in ((parcels().take(np.arange(rows)), parcels()), (parcels(), parcels().take(np.arange(rows)))):
        report = judge(window, learned)
        assert (report.alarm, report.status) == (False, "unknown")
        assert f"has {rows} rows, 500 are needed" in report.verdict
        assert "No alarm" not in report.verdict


def test_an_absent_column_fires_the_alarm_and_the_others_are_checked():
    window = parcels()
    report = judge(replace(window, rows=window.rows.drop(columns="carrier")))
    assert report.alarm and "column carrier is absent" in report.verdict
    assert report.get("drift", "weight").level == "ok" and report.get("drift", "carrier") is None
    nothing = judge(replace(window, rows=window.rows[[]]))
    assert len([one for one in nothing.at("alarm") if one.words.endswith("is absent")]) == 3


def test_text_where_numbers_should_be_fires_the_alarm():
    window = parcels()
    report = judge(replace(window, rows=window.rows.assign(weight="heavy")))
    assert "column weight: 100.0% of the values are not numbers" in report.verdict


@pytest.mark.parametrize("empty", [np.nan, None])
@pytest.mark.parametrize("column", ["weight", "carrier"])
def test_a_column_without_values_fires_the_alarm(column, empty):
    window = parcels()
    report = judge(replace(window, rows=window.rows.assign(**{column: empty})))
    assert report.get("missing", column).level == "alarm"
    assert report.get("drift", column).level == "unknown"
    assert f"{column} is missing in 100.0% of the rows" in report.verdict


def test_a_column_that_was_always_empty_is_fine():
    window, learned = (replace(w, rows=w.rows.assign(weight=np.nan)) for w in (parcels(), parcels(seed=1)))
    assert judge(window, learned).status == "ok"


def test_constant_columns():
    window, learned = (replace(w, rows=w.rows.assign(weight=5.0)) for w in (parcels(), parcels(seed=1)))
    assert judge(window, learned).get("drift", "weight").level == "ok"
    other = judge(replace(window, rows=window.rows.assign(weight=4.0)), learned)
    assert other.get("drift", "weight").level == "warning"


def test_new_values_are_named_and_many_of_them_fire_the_alarm():
    window = parcels()
    some = window.rows["carrier"].where(window.rows.index >= 15, "green")
    report = judge(replace(window, rows=window.rows.assign(carrier=some)))
    assert not report.alarm
    assert report.get("new values", "carrier").words == "carrier: 1 new value in 1.00% of the rows: green"
    many = window.rows["carrier"].where(window.rows.index >= 500, "green")
    assert judge(replace(window, rows=window.rows.assign(carrier=many))).get("new values", "carrier").level == "alarm"


def test_infinity_is_not_compared():
    window = parcels()
    odd = window.rows["weight"].where(window.rows.index >= 30, np.inf)
    report = judge(replace(window, rows=window.rows.assign(weight=odd)))
    assert np.isfinite(report.get("drift", "weight").value)
    assert "30 of 1,500 rows break the contract" in report.get("contract", "rows").words


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_of_truth(value):
    report = judge(replace(parcels(), y=np.full(1500, value)))
    assert report.get("performance", "roc_auc").level == "unknown"
    assert "the truth has only one class" in " ".join(report.words)
    assert report.get("performance", "calibration").level == "alarm"


@pytest.mark.parametrize("known", [0, 499])
def test_truth_that_is_not_known_yet(known):
    truth = np.where(np.arange(1500) < known, parcels().y, np.nan)
    report = judge(replace(parcels(), y=truth))
    assert report.status == "ok"
    assert report.words[1].startswith(f"Not checked: performance: truth is known for {known} of 1,500 predictions")


def test_neither_predictions_nor_truth():
    report = judge(replace(parcels(), p=None, y=None))
    assert "Not checked: predictions: the window has 0, 500 are needed." in report.words
    alone = monitor(parcels(seed=1), parcels(), INPUTS, RULES, None)
    assert alone.words[1].startswith("Not checked: performance: too few held-out rows to compare with; roc_auc 0.7")


def test_truth_replaces_the_estimate_only_where_it_could_have_shown_a_failure():
    moved, learned, held = parcels(18_000, 3), parcels(18_000, 1), parcels(18_000, 2)
    moved = replace(moved, rows=moved.rows.assign(weight=moved.rows["weight"] + 40))
    report = monitor(learned, moved, INPUTS, RULES, held)
    assert not report.alarm and "truth is known" in report.get("expected", "roc_auc").words
    days, many = np.arange(18_000) % 4, np.arange(18_000) % 40
    stormy = replace(moved, y=np.where(days == 0, 1.0, moved.y), blocks=days)  # what four days say may be chance
    learned, held = (replace(one, blocks=10 + many) for one in (learned, held))
    report = monitor(learned, stormy, INPUTS, RULES, held)
    assert report.get("performance", "roc_auc").level == "unknown"
    assert report.get("joint", "all columns").level == "unknown", "four days may be unlike others by chance"
    assert "without truth" in report.get("expected", "roc_auc").words


def told_first(positives: float, negatives: float, seed: int = 0, works: bool = True) -> Window:
    "A model for frauds, whose truth comes in time for these shares of the outcomes"
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(-2, 1.2, 4000)))
    y = (rng.uniform(size=4000) < (p if works else p.mean())).astype("float64")
    known = rng.uniform(size=4000) < np.where(y == 1, positives, negatives)
    return Window(pd.DataFrame({"amount": np.zeros(4000)}), p, np.where(known, y, np.nan))


def test_the_estimate_uses_as_much_of_the_level_before_the_truth_comes_as_later():
    "A window is judged before its truth is known, and after: what all of it may use of the level must add up to one"
    held, window = (replace(parcels(3000, seed), blocks=None) for seed in (1, 2))
    window = replace(window, p=0.5 + (window.p - 0.5) / 10)  # sorts worse, and is less sure
    some = np.where(np.arange(3000) % 5 == 0, window.y, np.nan)
    found = [judge_model(held, replace(window, y=y), held, INPUTS, RULES) for y in (None, some)]
    before, later = ([one.p_value for one in looks if one.check == "expected"] for looks in found)
    assert before == later and before[0] >= 1 / 2000 / level_shares["estimate"]
    assert sum(level_shares.values()) == pytest.approx(1)


def test_truth_that_comes_first_for_one_outcome_raises_no_alarm(tmp_path):
    held = told_first(1, 1)
    found = judge_model(held, told_first(0.9, 0.1, 1), held, [], RULES)
    report = Report("2024-04", 4000, found)
    off = report.get("performance", "calibration")
    assert not report.alarm and off.level == "warning" and "truth is known for 2" in off.words
    assert report.get("performance", "roc_auc").level == "unknown", "neither does it say that all is well"
    assert report.get("expected", "roc_auc").words.startswith("expected without truth")
    store(Lake(tmp_path), "monitoring/fraud", Report("2024-03", 4000, [replace(off, level="alarm", words="off")]))
    store(Lake(tmp_path), "monitoring/fraud", report)
    assert last_alarm(Lake(tmp_path), "monitoring/fraud", None) == "2024-03: off"


@pytest.mark.parametrize("known", [0.97, 1.0])
def test_truth_that_is_nearly_complete_raises_the_alarm(known):
    held = told_first(1, 1)
    found = judge_model(held, told_first(known, known, 1, works=False), held, [], RULES)
    assert Report("2024-04", 4000, found).get("performance", "roc_auc").level == "alarm"


def test_looks_at_truth_that_comes_in_use_less_of_the_level():
    "Each look at truth that grows is another chance of a false alarm, so the p of each is corrected"
    held = told_first(1, 1)

    def p(known: float, again: bool) -> float:
        found = judge_model(held, told_first(known, known, 1, works=False), held, [], RULES, again=again)
        return Report("2024-04", 4000, found).get("performance", "roc_auc").p_value

    least = 1 / 2000 / level_shares["truth"]
    assert [p(known, True) for known in (0.95, 1)] == pytest.approx([least / 0.6] * 2)
    assert p(0.95, False) == pytest.approx(least), "a batch is judged once, also where some truth never comes"


def asked(seed: int, copies: int, sticky: str = "") -> pd.DataFrame:
    "Answers of an API without truth: two thousand requests of all sorts, and copies of one, such as a health check"
    rng = np.random.default_rng(seed)
    x = np.r_[rng.normal(size=2000), np.full(copies, 0.3)]
    rows = pd.DataFrame({"date": "2026-11-24", "record": 0, "probability": 1 / (1 + np.exp(0.5 - 1.3 * x))})
    rows["request_id"], rows["sticky"] = [f"2026-11-24-{place}" for place in range(len(x))], sticky
    rows["inputs"] = [json.dumps({"x": value, "size": 2 * value}) for value in x.tolist()]
    return rows.assign(prediction=(x > 0.4) * 1, arm="champion", model_version=1)


@pytest.mark.parametrize("blocks", ["row", "unit"])
def test_copies_of_one_request_are_one_observation(tmp_path, blocks):
    lake, day, inputs = Lake(tmp_path), date(2026, 11, 24), [Input("x", "number"), Input("size", "number")]
    loaded = Loaded(None, Version("parcels", 1, None, ("champion",), {}, {}, {}, datetime.now(UTC)), {}, inputs)
    rng = np.random.default_rng(9)
    x = rng.normal(size=3000)
    p = 1 / (1 + np.exp(0.5 - 1.3 * x))
    held = Window(pd.DataFrame({"x": x, "size": 2 * x}), p, rng.uniform(size=3000) < p)

    def judge(rows: pd.DataFrame) -> Report:
        lake.write("served/parcels", rows, mode="overwrite", partition_by=["date"])
        today = day + timedelta(1)
        [found] = watch_traffic(lake, loaded, held, held, RULES, 1, 1, today, blocks=blocks).values()
        return found

    assert judge(asked(1, 0)).get("expected", "roc_auc").level == "ok"
    assert not judge(asked(1, 500)).alarm
    broken = asked(1, 500)
    broken["inputs"] = [json.dumps({"x": None, "size": size}) for size in rng.normal(size=len(broken))]
    assert judge(broken).get("missing", "x").level == "alarm", "requests that differ count one by one"


def test_all_looks_at_a_window_of_the_traffic_use_the_same_part_of_the_level(tmp_path):
    "Which look is the last cannot be known: a window of a week is the oldest of four on each of seven days"
    lake, day, inputs = Lake(tmp_path), date(2026, 11, 24), [Input("x", "number")]
    loaded = Loaded(None, Version("parcels", 1, None, ("champion",), {}, {}, {}, datetime.now(UTC)), {}, inputs)
    held, rows = told_first(1, 1), asked(1, 0)
    held = replace(held, rows=held.rows.assign(x=np.random.default_rng(9).normal(size=len(held.rows))))
    lake.write("served/parcels", rows, partition_by=["date"])
    truth = rows[["date", "request_id", "record"]].assign(truth=np.arange(2000) % 2, time=pd.Timestamp(0, tz="UTC"))
    lake.write("feedback/parcels", truth[:1900], partition_by=["date"])
    p = []
    for later in (1, 2):
        found = watch_traffic(lake, loaded, held, held, RULES, 1, 2, day + timedelta(later), blocks="row")
        p.append(found["2026-11-24"].get("performance", "roc_auc").p_value)
    assert p == pytest.approx([1 / 2000 / level_shares["truth"] / 0.6] * 2)


@pytest.mark.parametrize("blocks", ["day", "row", "unit"])
def test_of_more_answers_than_memory_should_hold_some_are_judged(tmp_path, monkeypatch, blocks):
    "Three thousand answers to three hundred clients, of which there is room for nine hundred"
    monkeypatch.setattr("mlpkg.monitoring.traffic.most_answers", 900)
    lake, day, inputs = Lake(tmp_path), date(2026, 11, 24), [Input("x", "number"), Input("size", "number")]
    loaded = Loaded(None, Version("parcels", 1, None, ("champion",), {}, {}, {}, datetime.now(UTC)), {}, inputs)
    rows = asked(1, 1000).assign(sticky=[f"client {place % 300}" for place in range(3000)])
    lake.write("served/parcels", pd.concat([rows, rows[:500]]), partition_by=["date"])  # some were asked again
    truth = rows[["date", "request_id", "record"]].assign(truth=1.0, time=pd.Timestamp(0, tz="UTC"))
    lake.write("feedback/parcels", truth, partition_by=["date"])
    window = served_window(read_served(lake, "parcels", 1, (day, day), "unit", 900)[0], yes_no, inputs, blocks=blocks)
    assert len(window.rows) == 900 and (window.y == 1).all()
    if blocks == "unit":
        assert np.unique(window.blocks, return_counts=True)[1].tolist() == [10] * 90
    learned = Window(pd.DataFrame({"x": np.random.default_rng(9).normal(size=3000)}).assign(size=lambda t: 2 * t["x"]))
    judge = partial(watch_traffic, lake, loaded, learned, None, RULES, 1, 1, day + timedelta(1), blocks=blocks)
    [report] = judge().values()
    assert report.rows == 900
    assert " (a sample of 900 of 3,500 answers): " in report.verdict
    version = lake.version("traffic/parcels")
    assert judge() and lake.version("traffic/parcels") == version, "the same are drawn again"


def test_a_dag_run_sees_the_reports_that_another_one_has_added(tmp_path):
    "Otherwise an earlier month that is judged again looks like the newest one, and its alarm starts a training"
    march, april = (Lake(tmp_path, run=letter * 32) for letter in "ab")
    bad, calm = (
        replace(judge(replace(parcels(), rows=parcels().rows.assign(weight=np.nan))), window="2024-03"),
        judge(parcels()),
    )
    store(march, "monitoring/parcels", bad)
    store(april, "monitoring/parcels", replace(calm, window="2024-04"))
    store(march, "monitoring/parcels", bad)  # its task was cleared
    assert set(read_history(march, "monitoring/parcels")["window"]) == {"2024-03", "2024-04"}


def test_a_report_is_stored_once_and_looks_back(tmp_path):
    lake, broken = Lake(tmp_path), parcels()
    broken = replace(broken, rows=broken.rows.assign(weight=np.nan))
    windows = {"2024-03": broken, "2024-04": parcels(), "2024-05": broken, "2024-06": broken}
    for _ in range(2):
        for month, window in windows.items():
            report = replace(judge(window), window=month)
            store(lake, "monitoring/parcels", with_history(report, read_history(lake, "monitoring/parcels")))
    history = read_history(lake, "monitoring/parcels")
    assert not history.duplicated(["window", "check", "column"]).any()
    since = history[(history["check"] == "missing") & history["alarm"]].set_index("window")["since"]
    assert since.to_dict() == {"2024-03": "2024-03", "2024-05": "2024-05", "2024-06": "2024-05"}


def found_in(window: str, value: float, level: str = "alarm") -> Report:
    return Report(window, 1000, [Finding("performance", "roc_auc", level, f"ROC AUC {value}", value)], "parcels", 1)


def test_an_answered_alarm_stays_answered_when_the_log_is_trimmed(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"
    store(lake, name, found_in("2024-999", 0.5))
    time.sleep(0.01)
    training = SimpleNamespace(info=SimpleNamespace(start_time=int(time.time() * 1000)))
    store(lake, name, found_in("2024-999", 0.5))  # the same once more
    for day in range(110):  # enough for a checkpoint
        store(lake, name, found_in(f"2024-{day:03}", 0.7, "ok"))
    assert last_alarm(lake, name, training) == ""
    list(tidy_lake(lake, datetime.now(UTC) + timedelta(seconds=5), {}))
    assert last_alarm(lake, name, training) == ""
    store(lake, name, found_in("2024-999", 0.4))
    assert last_alarm(lake, name, training) == "2024-999: ROC AUC 0.4"


def test_a_window_that_concluded_nothing_leaves_an_alarm_open(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"
    store(lake, name, found_in("2024-03", 0.5))
    store(lake, name, Report("2024-04", 30, [Finding("rows", "the window", "unknown", "the window has 30 rows")]))
    assert last_alarm(lake, name, None) == "2024-03: ROC AUC 0.5"
    store(lake, name, Report("2024-05", 1000, [Finding("contract", "rows", "ok", "rows are as agreed")]))
    assert last_alarm(lake, name, None) == "2024-03: ROC AUC 0.5", "of the performance nothing is known in May"
    store(lake, name, found_in("2024-05", 0.7, "ok"))
    assert last_alarm(lake, name, None) == ""


def test_a_figure_closes_its_own_alarm_and_no_other(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"

    def judged(window: str, *found: tuple[str, str, str]) -> str:
        findings = [Finding(check, column, level, f"{column} is {level}") for check, column, level in found]
        store(lake, name, Report(window, 1000, findings))
        return last_alarm(lake, name, None)

    alarms = [("performance", "roc_auc", "alarm"), ("missing", "weight", "alarm"), ("contract", "size", "alarm")]
    judged("2024-03", *alarms, ("contract", "rows", "ok"), ("missing", "carrier", "ok"))
    well = ("performance", "calibration", "ok"), ("performance", "brier", "warning"), ("missing", "carrier", "ok")
    several = judged("2024-04", *well, ("performance", "roc_auc", "unknown"), ("missing", "weight", "unknown"))
    assert several == "2024-03: roc_auc is alarm; weight is alarm; size is alarm"
    several = judged("2024-05", *well, ("contract", "rows", "ok"), ("missing", "weight", "ok"))
    assert several == "", "a check that names a figure no longer has ended it"
    judged("2024-06", ("performance", "roc_auc", "alarm"), ("contract", "size", "alarm"), ("contract", "rows", "ok"))
    assert judged("2024-07", *well, ("performance", "roc_auc", "unknown")) == "2024-06: roc_auc is alarm; size is alarm"
    assert judged("2024-08", ("contract", "rows", "ok")) == "2024-06: roc_auc is alarm"
    assert judged("2024-09", ("performance", "roc_auc", "ok")) == ""


def test_truth_that_comes_late_raises_an_alarm_unless_later_truth_says_otherwise(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"
    unknown = Finding("performance", "roc_auc", "unknown", "performance: truth is known for 0 of 1,000 predictions")
    for window in ("2024-03", "2024-04"):
        store(lake, name, Report(window, 1000, [unknown, Finding("contract", "rows", "ok", "rows are as agreed")]))
    training = SimpleNamespace(info=SimpleNamespace(start_time=int(time.time() * 1000)))
    time.sleep(0.01)
    store(lake, name, found_in("2024-03", 0.5))
    assert last_alarm(lake, name, training) == "2024-03: ROC AUC 0.5"
    store(lake, name, found_in("2024-04", 0.7, "ok"))
    assert last_alarm(lake, name, training) == ""


def test_files_are_judged_in_the_order_in_which_they_came_in(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"
    for window, value, level in (("west", 0.5, "alarm"), ("north", 0.5, "alarm"), ("east", 0.7, "ok")):
        note_taken(lake, "parcels", {Arrival(f"in/{window}.csv", ""): window})
        before = ["west"] if window == "north" else []
        store(lake, name, with_history(found_in(window, value, level), read_history(lake, name), before=before))
    history = read_history(lake, name)
    assert history["window"].tolist() == ["west", "north", "east"]
    assert history["since"].tolist() == ["west", "west", ""]
    assert last_alarm(lake, name, None) == "", "the file that came last is well"


def test_columns_that_are_ignored_change_nothing():
    window = parcels()
    more = window.rows.assign(ingested_at=np.arange(len(window.rows)), vector=[np.ones(3)] * len(window.rows))
    pd.testing.assert_frame_equal(judge(replace(window, rows=more)).checks, judge(window).checks)


def test_a_table_of_reports_without_times_has_those_of_its_log(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"
    for window in ("2024-03", "2024-04"):
        rows = as_rows(found_in(window, 0.5))
        lake.write(name, rows, mode="replace", partition={"window": window})
    before = lake.written(name, {"window": "2024-04"})
    training = SimpleNamespace(info=SimpleNamespace(start_time=int(before.timestamp() * 1000) + 1))
    assert last_alarm(lake, name, training) == ""
    store(lake, name, found_in("2024-03", 0.6))
    assert last_alarm(lake, name, training) == "", "the time of April is that of then"
    assert read_history(lake, name).set_index("window")["judged"]["2024-04"] == before


def test_a_report_that_is_stored_while_another_gives_the_table_its_column_is_kept(tmp_path, monkeypatch):
    import mlpkg.data.lake

    lake, name, write = Lake(tmp_path), "monitoring/parcels", mlpkg.data.lake.write_deltalake
    lake.write(name, as_rows(found_in("2024-03", 0.5)), mode="replace", partition={"window": "2024-03"})

    def overtaken(*args, **how):
        monkeypatch.setattr(mlpkg.data.lake, "write_deltalake", write)
        store(Lake(tmp_path), name, found_in("2024-05", 0.7))
        return write(*args, **how)

    monkeypatch.setattr(mlpkg.data.lake, "write_deltalake", overtaken)
    store(lake, name, found_in("2024-04", 0.6))
    history = read_history(lake, name)
    assert history["window"].tolist() == ["2024-03", "2024-04", "2024-05"] and history["judged"].notna().all()


def test_an_earlier_window_that_comes_late_dates_the_later_ones_anew(tmp_path):
    lake, name = Lake(tmp_path), "monitoring/parcels"
    for window in ("2024-03", "2024-02", "2024-03"):
        store(lake, name, with_history(found_in(window, 0.5), read_history(lake, name)))
    assert read_history(lake, name)["since"].tolist() == ["2024-02", "2024-02"]
    store(lake, name, found_in("2024-02", 0.7, "ok"))
    assert read_history(lake, name)["since"].tolist() == ["", "2024-03"]


@pytest.mark.parametrize(("rows", "known"), [(1500, (0, 1)), (40_000, (0, 1)), (1500, (0,)), (1500, (1,)), (1500, ())])
def test_the_order_of_rows_changes_no_finding(rows, known):
    days = np.arange(rows) * 30 // rows
    windows = [replace(parcels(rows, seed), blocks=days if side in known else None) for side, seed in enumerate((1, 5))]
    mix = np.random.default_rng(0).permutation(rows)
    one, two = (as_rows(judge(now, before)) for before, now in (windows, [one.take(mix) for one in windows]))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_rows_that_are_alike_are_drawn_like_others():
    table = pd.DataFrame({"carrier": np.repeat(["a", "b", "c"], [6000, 3000, 1000])})
    drawn = table.iloc[draw_rows(table, 1000, seed=3)]["carrier"].value_counts()
    assert len(set(draw_rows(table, 1000, seed=3))) == 1000
    assert abs(drawn["a"] - 600) < 60 and abs(drawn["b"] - 300) < 60
    assert draw_rows(table, 1000, seed=4).tolist() != draw_rows(table, 1000, seed=3).tolist()


FINGERPRINT = """
import sys
sys.path.insert(0, {folder!r})
from test_monitoring import fingerprint
print("fingerprint", fingerprint())
"""


def fingerprint() -> str:
    "Every digit of a report"
    values = judge(parcels(4000, 7)).checks.select_dtypes("number")
    return hashlib.sha256(values.to_numpy().tobytes()).hexdigest()


def test_same_digits_each_time_and_with_other_threads():
    env = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    command = [sys.executable, "-c", FINGERPRINT.format(folder=os.path.dirname(__file__))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)  # noqa: S603
    assert fingerprint() == fingerprint()
    assert f"fingerprint {fingerprint()}" in done.stdout.splitlines()


@pytest.mark.parametrize("known", [(), (0,), (1,), (0, 1)])
def test_the_order_of_rows_changes_no_drift(known):
    "To the last digit, whether both tables know their days, or one of them; large days lose rows at random"
    rng, windows = np.random.default_rng(0), []
    for side, seed in enumerate((1, 5)):
        window = parcels(seed=seed)
        weight = window.rows["weight"].where(rng.uniform(size=1500) > 0.1)
        days = 100 * side + np.minimum(rng.integers(0, 30, 1500), 20)
        windows.append(replace(window, rows=window.rows.assign(weight=weight), blocks=days if side in known else None))

    def drifts(before: Window, now: Window) -> list[dict]:
        names, blocks = ["weight", "distance", "carrier"], (before.blocks, now.blocks)
        found = [one(before.rows["weight"], now.rows["weight"], blocks) for one in (number_drift, missing_drift)]
        found += [text_drift(before.rows["carrier"], now.rows["carrier"], blocks)]
        found += [prediction_drift(before.p, now.p, blocks)]
        return found + column_drift(before.rows, now.rows, names, blocks).fillna(-1).to_dict("records")

    mixed = [one.take(rng.permutation(1500)) for one in windows]
    assert drifts(*windows) == drifts(*mixed)


def test_many_columns_and_few_rows_per_fold():
    wide = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 30)), columns=[f"c{i}" for i in range(30)])
    assert 0 <= joint_drift(wide.head(20), wide.tail(20), list(wide)).auc <= 1
    half = (np.repeat("a", 20), np.repeat("b", 20))  # a block on each side: nothing to learn from
    assert np.isnan(joint_drift(wide.head(20), wide.tail(20), list(wide), half).auc)


def test_one_new_day_cannot_be_told_from_old_ones_or_from_itself():
    rng = np.random.default_rng(0)
    old, new = (pd.DataFrame({"temp": rng.normal(size=rows)}) for rows in (6000, 480))
    one_day = joint_drift(old, new, ["temp"], (np.arange(6000) // 480, np.full(480, 99)))
    assert np.isnan(
        [one_day.auc, one_day.low, one_day.high]
    ).all()  # it was 0.88, from rows of which nothing was learned
    days = (np.arange(6000) // 480, 99 + np.arange(480) // 120)
    assert joint_drift(old, new, ["temp"], days).auc < 0.6


@pytest.fixture
def monitored(project, monkeypatch):
    "A project with a small lake and a champion"
    import mlflow

    monkeypatch.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))

    from mlpkg.models.oversight import promote_by_hand
    from mlpkg.models.registry import register
    from mlpkg.models.storage import log_model
    from mlpkg.steps.tracking import connect

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    lake = seed_lake(Lake(project.settings.lake.root), "2013-01..2013-04", rows=8000)
    parts = split(lake.read("clean/flights"), "2013-03")
    version = lake.write("split/flights", parts, mode="overwrite", change_schema=True)
    train = parts[parts["part"] != "holdout"]
    pipeline = fit("logistic_regression", train, "late", numeric, categorical)
    connect(project.settings)
    with mlflow.start_run():
        inputs = inputs_from(features_contract(), train, flight_features)
        uri = log_model(pipeline, train[flight_features], inputs=inputs)
        promote_by_hand("flights", register(uri, "flights", {"split/flights": version}), "the first")
    yield project, lake, pipeline
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


def test_the_step_judges_the_champion(monitored):
    from mlpkg.steps.run import run_step

    project, lake, pipeline = monitored
    april = lake.read("clean/flights", filters=[("month", "=", "2013-04")])
    given = april[["month", "day", "carrier", "flight", "origin", "dest"]].assign(
        probability=probability(pipeline, april), model="flights", model_version=1
    )
    lake.write("predictions/flights", given)
    notebook = ROOT / "nbs/pipelines/flights/34_monitor.ipynb"
    scraps = run_step(notebook, {"months": "2013-04"}, settings=project.settings).scraps
    assert scraps["alarm"] is True and scraps["month"] == "2013-04" and scraps["rows"] == len(april)
    assert scraps["verdict"].startswith("Alarm in 2013-04: ") and "temp" in scraps["drifted"]
    assert scraps["late_rate"] == pytest.approx(april["late"].mean(), abs=1e-6)
    first = read_history(lake, "monitoring/flights", "month")
    lake.write("predictions/flights", given.head(0), mode="overwrite")
    scraps = run_step(notebook, {"months": "2013-04"}, settings=project.settings).scraps  # scores them itself
    assert scraps["alarm"] is True
    pd.testing.assert_frame_equal(read_history(lake, "monitoring/flights", "month"), first, check_exact=True)


def test_an_alarm_that_was_answered_is_not_raised_again_by_the_same_findings(monitored, monkeypatch):
    from mlpkg.monitoring.retraining import last_training, retrain_reasons
    from mlpkg.settings import load_settings
    from mlpkg.steps.run import run_step
    from mlpkg.steps.tracking import end_run, open_pipeline_run

    project, lake, _ = monitored

    def judge() -> tuple[bool, str]:
        notebook = ROOT / "nbs/pipelines/flights/34_monitor.ipynb"
        scraps = run_step(notebook, {"months": "2013-04"}, settings=project.settings).scraps
        assert scraps["alarm"] or not scraps["retrain"]
        return scraps["retrain"], last_alarm(
            lake, "monitoring/flights", last_training(project.mlflow, "flights_train"), "month"
        )

    assert judge()[0] is True
    assert judge()[0] is True, "nobody has answered yet"
    end_run(project.mlflow, open_pipeline_run(project.mlflow, project.settings, "flights_train", "answer"), "FINISHED")
    assert judge() == (False, ""), "the same month, the same flights, the same champion"
    april = lake.read("clean/flights", filters=[("month", "=", "2013-04")])
    lake.write("clean/flights", april[1:], mode="replace", partition={"month": "2013-04"})
    asks, words = judge()
    assert asks is True and words.startswith("2013-04: "), "corrected flights are judged anew"
    running = open_pipeline_run(project.mlflow, project.settings, "flights_train", "second")
    asks, words = judge()
    assert asks is False and words.startswith("2013-04: "), "one is running: the alarm waits, and stays open"
    end_run(project.mlflow, running, "FAILED")
    assert judge()[0] is False, "one has just failed"
    monkeypatch.setenv("MLPKG_AIRFLOW__RETRAIN_WAIT", "0.0000001")
    assert retrain_reasons(
        project.mlflow, lake, load_settings(), "flights_train", "monitoring/flights", "month"
    ).retrain
    assert judge()[0] is True


def test_the_step_does_not_judge_by_another_table_that_has_the_number_of_the_champions(monitored):
    from mlpkg.data.pins import version_mark
    from mlpkg.steps.execution import StepError
    from mlpkg.steps.run import run_step

    project, lake, _ = monitored
    table = "split/flights"
    project.mlflow.set_model_version_tag(
        "flights", "1", f"mark.{table}", version_mark(lake, table, lake.version(table))
    )
    parts = lake.read(table)
    shutil.rmtree(f"{lake.root}/{table}")
    for _ in range(2):
        lake.write(table, parts, mode="overwrite")
    notebook = ROOT / "nbs/pipelines/flights/34_monitor.ipynb"
    with pytest.raises(StepError, match="made anew or restored from a backup since"):
        run_step(notebook, {"months": "2013-04"}, settings=project.settings)


def test_what_the_api_was_asked_is_judged(monitored):
    "A client that sends no temperatures, and the truth that it reports: no batch shows either"
    from fastapi.testclient import TestClient

    from mlpkg.examples.flights import training_windows
    from mlpkg.models.registry import load_model
    from mlpkg.monitoring.traffic import watch_traffic
    from mlpkg.serving.app import create_app
    from mlpkg.settings import load_settings

    project, lake, _ = monitored
    env = {"MLPKG_SERVING__MODEL": "flights", "MLPKG_SERVING__FOLDER": str(project.root / "serving")}
    settings = load_settings(file=project.root / "settings.ini", env=env)
    rows = lake.read("clean/flights", filters=[("month", "=", "2013-03")]).dropna(subset="late").head(600)
    asked = rows[flight_features].assign(temp=None).astype("object")
    asked = asked.where(asked.notna(), None).to_dict("records")
    with TestClient(create_app(settings), "http://localhost", client=("127.0.0.1", 1)) as api:
        for start in range(0, 600, 100):
            answer = api.post("/v1/predict", json={"records": asked[start : start + 100]})
            assert answer.status_code == 200, answer.text
            name, late = answer.json()["request_id"], rows["late"][start : start + 100].astype(int)
            truths = [{"request_id": name, "record": place, "truth": one} for place, one in enumerate(late)]
            told = api.post("/v1/feedback", json={"truths": truths})
            assert len(told.json()["accepted"] + told.json()["waiting"]) == 100, told.text  # the lake comes later
    loaded, today = load_model("flights"), datetime.now(UTC).date()
    windows = training_windows(loaded, lake.read("split/flights"))
    assert watch_traffic(lake, loaded, *windows, RULES, days=1, today=today) == {}, "the day is not over"
    found = watch_traffic(lake, loaded, *windows, RULES, days=1, today=today + timedelta(days=1))
    report = found[today.isoformat()]
    assert report.rows == 600 and report.get("missing", "temp").level == "alarm"
    assert np.isfinite(report.get("performance", "roc_auc").value), "truth is joined with the answers"
    assert "temp is missing in 100.0% of the rows" in last_alarm(lake, "monitoring/flights", None, "month")


def test_the_step_judges_what_the_api_was_asked(monitored):
    from mlpkg.steps.run import run_step

    project, lake, pipeline = monitored
    rows = lake.read("clean/flights", filters=[("month", "=", "2013-03")]).head(600)
    day = (datetime.now(UTC) - timedelta(days=7)).date().isoformat()
    answers = pd.DataFrame({"date": day, "request_id": day, "record": np.arange(600), "arm": "champion", "sticky": ""})
    answers = answers.assign(model_version=1, prediction=0, probability=probability(pipeline, rows))
    answers["inputs"] = [one.to_json() for _, one in rows[flight_features].assign(temp=None).iterrows()]
    lake.write("served/flights", answers, partition_by=["date"])
    run_step(ROOT / "nbs/pipelines/flights/34_monitor.ipynb", {"months": "2013-03"}, settings=project.settings)
    found = read_history(lake, "traffic/flights")
    assert set(found["rows"]) == {600} and "temp" in found.loc[found["alarm"], "column"].tolist()
