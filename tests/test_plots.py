"""Pictures with long or many names, narrow and wide log axes, and nothing to show: no text over another, no white ones.

A page shows one picture of each kind; whether texts overlap is seen only once they are laid out, for many shapes.
"""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mlpkg.models.comparison import Comparison, plot_comparison
from mlpkg.models.evaluation import evaluate
from mlpkg.models.plots import plot_confusion, plot_slices, plot_values
from mlpkg.models.tasks import Task
from mlpkg.monitoring.checks import Finding
from mlpkg.monitoring.plots import plot_drift, plot_history
from mlpkg.monitoring.report import Report, as_rows
from mlpkg.settings import PromotionSettings

models = ("ridge", "hist_gradient_boosting", "champion (version 12)")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def corners(text) -> np.ndarray:
    "The corners of a text as it is turned, in pixels"
    box, angle = text.get_window_extent(), np.deg2rad(text.get_rotation())
    if text.get_rotation() % 90 == 0:
        return np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])
    text.set_rotation(0)
    flat = text.get_window_extent()
    text.set_rotation(np.rad2deg(angle))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [flat.width / 2, flat.height / 2]
    return half @ turn + [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]


def apart(one: np.ndarray, other: np.ndarray) -> bool:
    "Can a line be drawn between two rectangles? (separating axes)"
    for box in (one, other):
        for edge in (box[1] - box[0], box[3] - box[0]):
            first, second = one @ edge, other @ edge
            if first.max() <= second.min() + 1e-6 or second.max() <= first.min() + 1e-6:
                return True
    return False


def overlaps(figure) -> list[tuple[str, str]]:
    "Pairs of texts of which one lies over the other"
    figure.canvas.draw()
    found = []
    for axes in figure.axes:
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        minor = [*axes.get_xticklabels(minor=True), *axes.get_yticklabels(minor=True)]
        some = [one for one in (*ticks, *minor, *axes.texts, axes.xaxis.label) if one.get_text() and one.get_visible()]
        (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        seen = [one for one in some if one not in (*ticks, *minor) or is_drawn(one, left, right, low, high)]
        boxes = [(one.get_text(), corners(one)) for one in seen]
        found += [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if not apart(one, other)]
    return found


def is_drawn(label, left, right, low, high) -> bool:
    "Is a tick label within its axis? matplotlib keeps those that are not"
    x, y = label.get_position()
    return left <= x <= right if y in (0, 1) else low <= y <= high


def classes(names: tuple[str, ...]):
    rng, task = np.random.default_rng(0), Task("multiclass", names)
    true = rng.integers(0, len(names), 2000)
    said = rng.dirichlet([1] * len(names), 2000) * 0.5 + 0.5 * np.eye(len(names))[true]
    return evaluate(task.names(true), said, task=task)


several = tuple(sorted(f"{a} {b}" for a in ("dark", "brilliantly light", "medium") for b in ("crimson", "emerald")))
shapes = [
    ("a", "b", "c"),
    ("a rather long class name", "another rather long one", "short"),
    several,
    tuple(sorted(f"{one}, of {kind}" for one in several for kind in ("old stock", "new stock"))),
]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("names", shapes, ids=len)
def test_no_text_of_a_confusion_matrix_lies_over_another(names, count):
    figure = plot_confusion(dict.fromkeys(models[:count], classes(names)))
    assert overlaps(figure) == []
    shown = [one.get_text() for one in figure.axes[0].get_yticklabels()]
    assert len(set(shown)) == len(shown) == min(len(names), 10), "shortened names stay different"
    width, height = figure.get_size_inches()
    assert width < 14 and height < 16


@pytest.mark.parametrize(("low", "high"), [(100, 420), (110, 190), (300, 20_000), (0.001, 1e6)])
def test_no_label_of_a_log_axis_lies_over_another(low, high):
    rng = np.random.default_rng(0)
    paid = np.exp(rng.uniform(np.log(low), np.log(high), 500))
    found = evaluate(paid, paid * rng.lognormal(0, 0.1, 500), task=Task("regression", scale="log"))
    figure = plot_values(dict.fromkeys(models, found))
    assert overlaps(figure) == []
    figure.canvas.draw()
    axes = figure.axes[0]
    within = [x for x in axes.get_xticks() if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    assert 2 <= len(within) <= 6


@pytest.mark.parametrize("values", [[0.16, 0.13, 0.11], [0.6, 0.02, 0.004], [40.0, 0.0001]])
def test_bars_of_drift_are_on_the_same_scale_everywhere(values):
    found = [Finding("drift", f"column {n}", "ok", "", value, threshold=0.1) for n, value in enumerate(values)]
    figure = plot_drift(Report("2026-03", 100, found))
    assert overlaps(figure) == []
    assert figure.axes[0].get_xlim()[0] == 1e-3


def words(figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts).replace("\n", " ")


def test_a_picture_with_nothing_to_show_says_so():
    nothing = Comparison("too little to judge by: 90 rows in 3 blocks; at least 200 rows in 5 blocks are needed. " * 3)
    figure = plot_comparison(nothing, PromotionSettings())
    assert nothing.problem.strip() in words(figure) and overlaps(figure) == []
    box, page = figure.axes[0].texts[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert "no column could be compared" in words(plot_drift(Report("2026-03", 100, [])))
    found = [as_rows(Report(f"2026-0{n}", 9, [Finding("rows", "rows", "unknown", "", 9)]), "window") for n in (1, 2)]
    assert words(plot_history(pd.concat(found))).count("not known in any window yet") == 2


def slices(kind: str = "binary"):
    rng, n = np.random.default_rng(0), 3000
    days = np.arange(n) // 100
    groups = pd.DataFrame(
        {"town": rng.choice(["north", "south", "a very long name of a town " * 2], n, p=[0.7, 0.28, 0.02])}
    )
    luck = rng.normal(0, 1.0, 30)[days]
    if kind == "regression":
        y, said, task = 50 + 9 * luck + rng.normal(0, 5, n), np.full(n, 50.0), Task("regression")
    else:
        y, said, task = (
            (rng.uniform(size=n) < 1 / (1 + np.exp(-luck))).astype(int),
            np.full(n, 0.5),
            Task("binary", (0, 1)),
        )
    return evaluate(y, said, groups, task), evaluate(y, said, groups, task, blocks=days)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_a_slice_has_an_interval_which_respects_blocks_and_a_legend_for_hollow_marks(kind):
    alone, by_day = slices(kind)
    for table in (alone.slices, by_day.slices):
        assert (table["low"] < table["observed"]).all() and (table["observed"] < table["high"]).all()
    widths = [(one.slices["high"] - one.slices["low"])[0] for one in (alone, by_day)]
    assert widths[1] > 1.5 * widths[0], "days differ, so rows of one day are no independent evidence"
    figure = plot_slices(by_day, "town")
    (axes,) = figure.axes
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["observed, 95 % interval", "predicted", "hollow: under 100 rows"]
    (bars,) = [one for one in axes.collections if len(one.get_paths()) == 3 and one.get_linewidths()[0] > 1]
    ends = sorted(path.vertices[:, 0].tolist() for path in bars.get_paths())
    np.testing.assert_allclose(ends, sorted(by_day.slices[["low", "high"]].to_numpy().tolist()))
    assert overlaps(figure) == []
    assert max(len(label.get_text()) for label in axes.get_yticklabels()) < 40


def test_without_small_slices_nothing_is_hollow():
    evaluation, _ = slices()
    big = evaluate(evaluation.y, evaluation.p, {"half": np.arange(3000) // 1500}, evaluation.task)
    told = [text.get_text() for text in plot_slices(big, "half").axes[0].get_legend().get_texts()]
    assert told == ["observed, 95 % interval", "predicted"]


def test_intervals_of_slices_hold_what_they_promise():
    "A model that is right: in how many of 300 worlds the interval of a slice holds its prediction"
    rng, held = np.random.default_rng(1), []
    for _ in range(300):
        p = rng.uniform(0.1, 0.6, 400)
        table = evaluate((rng.uniform(size=400) < p).astype(int), p, {"town": ["all"] * 400}).slices
        held.append(table["low"][0] <= table["predicted"][0] <= table["high"][0])
    assert 0.92 <= np.mean(held) <= 0.98
