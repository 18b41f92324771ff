"""How often the alarm of the monitor fires where nothing has changed, and how often where something has.

Days of later months than the model has learned from are dealt at random into a reference, held-out rows and a window.
They differ by chance alone, so an alarm is a false one. Then the window is made worse by a known amount. All rows and
all columns are used, and no threshold was chosen on these months.

What is measured is divided into cells: a case (truth is known or not, few rows are held out, one day is large) and the
length of the window. A cell is written to bench/alarms.json as it ends, with what the package was that it measured, so
a run that was stopped goes on where it was.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats

from mlpkg.data.inputs import Input, inputs_from
from mlpkg.examples.flights import categorical, clean, day_of, features_contract, flight_features, numeric
from mlpkg.examples.flights_data import months, read_planes, read_source, read_weather
from mlpkg.models.scoring import probability
from mlpkg.models.training import fit
from mlpkg.monitoring.checks import Finding
from mlpkg.monitoring.performance import leading_figure
from mlpkg.monitoring.verdict import judge_model, judge_rows
from mlpkg.monitoring.windows import Window
from mlpkg.settings import MonitoringSettings
from mlpkg.steps.provenance import package_digest

RESULT = Path(__file__).with_name("alarms.json")
LENGTHS = {"day": 1, "week": 7, "month": 30}  # Days
REFERENCE, HELD = 90, 30  # Days that stand for what was learned, and those among them with predictions and truth
RULES = MonitoringSettings()


@dataclass(frozen=True)
class Pool:
    "Days that differ by chance alone, with predictions of a model that has not seen them"

    window: Window  # Blocks are numbers of days
    inputs: list[Input]


@cache
def flights(learned: str = "2013-01..2013-03", dealt: str = "2013-04..2013-12") -> Pool:
    "The model of the example, and later months"
    wanted = [*months(learned), *months(dealt)]
    table = clean(read_source("package", wanted), read_weather(wanted), read_planes()).dropna(subset="late")
    train, later = (table[table["month"].isin(months(some))].reset_index(drop=True) for some in (learned, dealt))
    pipeline = fit("hist_gradient_boosting", train, "late", numeric, categorical)
    days = day_of(later).factorize()[0]
    window = Window(later[flight_features], probability(pipeline, later), later["late"], days)
    return Pool(window, inputs_from(features_contract(), train, flight_features))


def deal_days(pool: Pool, days: int, seed: int) -> tuple[Window, Window, Window]:
    "Reference, held-out rows, and a window of some days"
    order = np.random.default_rng(seed).permutation(pool.window.blocks.max() + 1)
    parts = order[days : days + REFERENCE], order[days : days + HELD], order[:days]
    learned, held, window = (pool.window.take(np.isin(pool.window.blocks, part)) for part in parts)
    return learned.at_most(30_000), held, window


def alarms(
    pool: Pool, learned: Window, held: Window, window: Window, rules: MonitoringSettings, rows: bool = True
) -> list[Finding]:
    "All that raises an alarm, without the warnings that need a classifier"
    found = judge_rows(learned, window, pool.inputs, rules) if rows else []
    return [one for one in [*found, *judge_model(learned, window, held, pool.inputs, rules)] if one.level == "alarm"]


# What else may be so of held-out rows and window: from both and a seed, others in which nothing has changed either


def as_usual(held: Window, window: Window, seed: int) -> tuple[Window, Window]:
    "Thirty days are held out, and the truth is known"
    return held, window


def no_truth(held: Window, window: Window, seed: int) -> tuple[Window, Window]:
    "The truth about the window is not known yet"
    return held, replace(window, y=None)


def few_held(rows: int) -> Callable[[Window, Window, int], tuple[Window, Window]]:
    "Few rows are held out"
    return lambda held, window, seed: (held.at_most(rows, seed), window)


def few_held_no_truth(held: Window, window: Window, seed: int) -> tuple[Window, Window]:
    "Few rows are held out, and the truth about the window is not known yet"
    return no_truth(held.at_most(600, seed), window, seed)


def one_large_day(held: Window, window: Window, seed: int) -> tuple[Window, Window]:
    "One day has ten times as many rows as each of the others, as in a campaign"
    large, rng = window.blocks == window.blocks[0], np.random.default_rng(seed)
    return held, window.take(large | (rng.uniform(size=len(large)) < 0.1))


@dataclass(frozen=True)
class Cell:
    "Windows of one kind"

    case: str
    length: str
    worse: bool = False  # Is every fifth of them made worse, too?


CASES: dict[str, Callable[[Window, Window, int], tuple[Window, Window]]] = {
    "as usual": as_usual,
    "no truth": no_truth,
    "600 held-out rows": few_held(600),
    "90 held-out rows": few_held(90),
    "600 held-out rows, no truth": few_held_no_truth,
    "one large day": one_large_day,
}
CELLS = [
    *(Cell("no truth", length) for length in LENGTHS),
    *(Cell(case, "month") for case in ("600 held-out rows", "90 held-out rows", "600 held-out rows, no truth")),
    *(Cell("one large day", length) for length in ("week", "month")),
    *(Cell("as usual", length, True) for length in LENGTHS),
]


def rules_of(case: str) -> MonitoringSettings:
    "Thresholds as they are, but where fewer rows are held out than a verdict needs"
    return RULES.model_copy(update={"min_rows": 90}) if case.startswith("90") else RULES


# Ways to make a window worse: from window, size (0 to 1) and random numbers, another window


def confused(window: Window, size: float, rng: np.random.Generator) -> Window:
    "A share of the answers belongs to other rows"
    some, p = np.flatnonzero(rng.uniform(size=len(window.p)) < size), window.p.copy()
    p[some] = p[rng.permutation(some)]
    return replace(window, p=p)


def later(window: Window, size: float, rng: np.random.Generator) -> Window:
    "Positives become more frequent by so much"
    flipped = rng.uniform(size=len(window.y)) < size / (1 - window.y.mean())
    return replace(window, y=np.where(flipped, 1.0, window.y))


def emptied(window: Window, size: float, rng: np.random.Generator) -> Window:
    "A share of the cells of a column is missing"
    values = window.rows["distance"].where(rng.uniform(size=len(window.rows)) >= size)
    return replace(window, rows=window.rows.assign(distance=values))


def renamed(window: Window, size: float, rng: np.random.Generator) -> Window:
    "A share of the cells of a column has a value that nobody knows"
    values = window.rows["carrier"].where(rng.uniform(size=len(window.rows)) >= size, "ZZ")
    return replace(window, rows=window.rows.assign(carrier=values))


WAYS: dict[str, tuple[Callable[..., Window], tuple[float, ...]]] = {
    "answers of other rows": (confused, (0.3, 0.6)),
    "more positives": (later, (0.1, 0.2)),
    "missing values": (emptied, (0.5, 1.0)),
    "new values": (renamed, (0.5, 1.0)),
}


def bounds(count: int, trials: int) -> tuple[float, float]:
    "The exact interval of a share (Clopper and Pearson)"
    found = stats.binomtest(count, trials).proportion_ci(method="exact")
    return float(found.low), float(found.high)


def trial(pool: Pool, cell: Cell, seed: int, worse: bool) -> list[tuple[str, float, bool, float]]:
    "Way, size, whether the alarm fires, and by how much the ROC AUC falls; the window as it is comes first"
    learned, held, window = deal_days(pool, LENGTHS[cell.length], seed)
    (held, window), rules = CASES[cell.case](held, window, seed), rules_of(cell.case)
    usual = leading_figure("binary", window.judged)
    found = [("nothing", 0.0, bool(alarms(pool, learned, held, window, rules)), 0.0)]
    for name, (way, sizes) in WAYS.items() if worse else ():
        for size in sizes:
            changed, rows = way(window, size, np.random.default_rng(seed)), name in ("missing values", "new values")
            told = (
                judge_rows(learned, changed, pool.inputs, rules)
                if rows
                else alarms(pool, learned, held, changed, rules, False)
            )
            alarm = any(one.level == "alarm" for one in told)
            found.append((name, size, alarm, usual - leading_figure("binary", changed)))
    return found


def measure(cell: Cell, trials: int, seconds: float, code: str) -> list[dict[str, Any]]:
    "Alarms by change and size: as many trials as there is time for, and no more than are asked for"
    pool, end, found = flights(), monotonic() + seconds, dict[tuple[str, float], list[tuple[bool, float]]]()
    for seed in range(trials):
        if seed and monotonic() > end:
            break
        for name, size, alarm, fall in trial(pool, cell, seed, seed % 5 == 0 and cell.worse):
            found.setdefault((name, size), []).append((alarm, fall))
    table = []
    for (name, size), cases in found.items():
        count, n = sum(alarm for alarm, _ in cases), len(cases)
        low, high = (round(end, 4) for end in bounds(count, n))
        about = {"case": cell.case, "window": cell.length, "change": name, "size": size, "code": code}
        counts = {"trials": n, "alarms": count, "share": round(count / n, 4), "low": low, "high": high}
        table.append(about | counts | {"auc_fall": round(float(np.mean([fall for _, fall in cases])), 4)})
    return table


def known() -> list[dict[str, Any]]:
    "What was measured before"
    return json.loads(RESULT.read_text()) if RESULT.exists() else []


def keep(rows: list[dict[str, Any]]) -> None:
    "Put a cell in the place of what was known of it"
    cells = [(cell.case, cell.length) for cell in CELLS]
    others = [one for one in known() if (one["case"], one["window"]) != (rows[0]["case"], rows[0]["window"])]
    table = sorted([*others, *rows], key=lambda one: cells.index((one["case"], one["window"])))
    partial = RESULT.with_suffix(".part")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(RESULT)


def left(only: str, code: str) -> list[Cell]:
    "Cells of some cases that were not measured with this version of the package"
    wanted = [cell for cell in CELLS if only in cell.case]
    if not wanted:
        raise typer.BadParameter(f"no case has {only!r} in its name (there are: {', '.join(CASES)})")
    done = {(one["case"], one["window"]) for one in known() if one["code"] == code}
    return [cell for cell in wanted if (cell.case, cell.length) not in done]


def main(
    only: Annotated[str, typer.Option(help="Cases to measure, by a part of their name; all unless given")] = "",
    trials: Annotated[int, typer.Option(help="Windows of each cell at most, of which every fifth is made worse")] = 100,
    minutes: Annotated[float, typer.Option(help="Time for all cells together, which they share equally")] = 55,
    workers: Annotated[int, typer.Option(help="Processes")] = 2,
    anew: Annotated[bool, typer.Option(help="Measure again what is known of this package")] = False,
) -> None:
    "Measure false alarms and power, print the table and write bench/alarms.json"
    code = package_digest()  # before anything is measured: files may change meanwhile
    cells = left(only, "" if anew else code)
    with ProcessPoolExecutor(workers) as pool:
        share = 60 * minutes * min(workers, len(cells)) / max(len(cells), 1)
        for job in as_completed([pool.submit(measure, cell, trials, share, code) for cell in cells]):
            keep(job.result())
    for row in known():
        told = f"{row['alarms']:4} of {row['trials']:4} = {row['share']:4.0%} ({row['low']:4.0%} to {row['high']:4.0%})"
        print(f"{row['case']:28} {row['window']:6} {row['change']:22} {row['size']:4.0%} {told}")


if __name__ == "__main__":
    typer.run(main)
