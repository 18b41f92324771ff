"""How often the alarm of the monitor fires where nothing has changed, and how often where something has.

Days of later months than the model has learned from are dealt at random into a reference, held-out rows and a window.
They differ by chance alone, so an alarm is a false one. Then the window is made worse by a known amount. All rows and
all columns are used, and no threshold was chosen on these months.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats

from mlpkg.data.inputs import Input, inputs_from
from mlpkg.examples.flights import categorical, clean, day_of, features_contract, flight_features, numeric
from mlpkg.examples.flights_data import months, read_planes, read_source, read_weather
from mlpkg.models.scoring import probability
from mlpkg.models.training import fit
from mlpkg.monitoring.checks import Finding, Window
from mlpkg.monitoring.performance import leading_figure
from mlpkg.monitoring.verdict import judge_model, judge_rows
from mlpkg.settings import MonitoringSettings

RESULT = Path(__file__).with_name("alarms.json")
LENGTHS = {"day": 1, "week": 7, "month": 30}  # Days
REFERENCE, HELD = 90, 30  # Days that stand for what was learned, and those among them with predictions and truth
RULES = MonitoringSettings()


@dataclass(frozen=True)
class Pool:
    "Days that differ by chance alone, with predictions of a model that has not seen them"

    window: Window  # Blocks are numbers of days
    inputs: list[Input]


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


def alarms(pool: Pool, learned: Window, held: Window, window: Window, rows: bool = True) -> list[Finding]:
    "All that raises an alarm, without the warnings that need a classifier"
    found = judge_rows(learned, window, pool.inputs, RULES) if rows else []
    return [one for one in [*found, *judge_model(learned, window, held, pool.inputs, RULES)] if one.level == "alarm"]


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


def trial(pool: Pool, days: int, seed: int, powers: bool) -> list[tuple[str, float, bool, float]]:
    "Way, size, whether the alarm fires, and the ROC AUC of the window; the window as it is comes first"
    learned, held, window = deal_days(pool, days, seed)
    found = [("nothing", 0.0, bool(alarms(pool, learned, held, window)), leading_figure("binary", window))]
    for name, (way, sizes) in WAYS.items() if powers else ():
        for size in sizes:
            worse = way(window, size, np.random.default_rng(seed))
            rows = name in ("missing values", "new values")
            fired = (
                judge_rows(learned, worse, pool.inputs, RULES) if rows else alarms(pool, learned, held, worse, False)
            )
            alarm = any(one.level == "alarm" for one in fired)
            found.append((name, size, alarm, leading_figure("binary", worse)))
    return found


def measure(length: str, trials: int, powers: int) -> list[dict[str, Any]]:
    "Alarms by change and size for windows of a length"
    pool, found = flights(), dict[tuple[str, float], list[tuple[bool, float]]]()
    for seed in range(trials):
        for name, size, alarm, auc in trial(pool, LENGTHS[length], seed, seed < powers):
            found.setdefault((name, size), []).append((alarm, auc))
    table = []
    for (name, size), cases in found.items():
        count, usual = sum(alarm for alarm, _ in cases), [auc for _, auc in found["nothing", 0.0][: len(cases)]]
        low, high = bounds(count, len(cases))
        fall = float(np.mean(usual) - np.mean([auc for _, auc in cases]))
        about = {"window": length, "change": name, "size": size, "trials": len(cases), "alarms": count}
        table.append(about | {"share": count / len(cases), "low": low, "high": high, "auc_fall": round(fall, 4)})
    return table


def main(
    trials: Annotated[int, typer.Option(help="Windows of each length in which nothing has changed")] = 100,
    powers: Annotated[int, typer.Option(help="How many of them are made worse, too")] = 20,
) -> None:
    "Measure false alarms and power, print the table and write bench/alarms.json"
    with ProcessPoolExecutor(len(LENGTHS)) as workers:
        jobs = [workers.submit(measure, length, trials, powers) for length in LENGTHS]
        table = [row for job in jobs for row in job.result()]
    for row in table:
        told = f"{row['alarms']:4} of {row['trials']:4} = {row['share']:4.0%} ({row['low']:4.0%} to {row['high']:4.0%})"
        print(f"{row['window']:6} {row['change']:22} {row['size']:4.0%} {told}  AUC {-row['auc_fall']:+.3f}")
    RESULT.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
