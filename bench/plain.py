"""The training pipeline as one plain script: the limit that no way of running notebooks can beat.

Makes the library calls of the step notebooks in the same order, and draws what they show, without a kernel.
"""

import io
import json
import sys
from dataclasses import replace
from typing import Any

import matplotlib

matplotlib.use("agg")

import mlflow
from matplotlib.figure import Figure

from mlpkg.data.inputs import inputs_from
from mlpkg.data.lake import open_lake
from mlpkg.data.pins import version_mark
from mlpkg.examples.flights import categorical, features_contract, flights_holdout, numeric
from mlpkg.models.comparison import Comparison, compare, plot_comparison
from mlpkg.models.evaluation import compare_models, evaluate, objective
from mlpkg.models.holdout import Learner, fair_rows
from mlpkg.models.oversight import history
from mlpkg.models.plots import plot_evaluations, plot_slices
from mlpkg.models.promotion import best_candidate, count_uses, logged_candidates, opponent, promote, submit
from mlpkg.models.registry import load_logged, load_model
from mlpkg.models.scoring import probability
from mlpkg.models.storage import log_model
from mlpkg.models.training import importances, plot_trials, search
from mlpkg.monitoring.report import count_alarms, read_history
from mlpkg.settings import load_settings
from mlpkg.steps.tracking import connect

MODEL = "flights"
SHOWN = ["roc_auc", "roc_auc_low", "roc_auc_high", "pr_auc", "brier", "log_loss", "calibration_error"]


def draw(figure: Figure) -> None:
    "Turn a figure into a picture, as a notebook does when it shows one"
    figure.savefig(io.BytesIO(), format="png", bbox_inches="tight")
    matplotlib.pyplot.close(figure)


def train_step(candidate: str, budget: int, seed: int) -> dict[str, Any]:
    "What 20_train does"
    metric, lake = load_settings().promotion.metric, open_lake()
    version = lake.version("split/flights")
    parts = lake.read("split/flights", filters=[("part", "in", ["train", "validation"])], version=version)
    train, valid = parts[parts.part == "train"], parts[parts.part == "validation"]
    print(parts.groupby(["part", "month"])["late"].agg(flights="size", late="mean").round(3))
    result = search(
        candidate, train, valid, "late", numeric, categorical, budget=budget, seed=seed, row_cap=60_000,
        on_trial=lambda trial: mlflow.log_metric(f"trial_{metric}", trial.value, step=trial.number),
        **objective(metric),
    )  # fmt: skip
    mlflow.log_table(result.trials, "trials.json")
    draw(plot_trials(result).figure)
    print(importances(result.pipeline, valid, "late", numeric, categorical, seed=seed).head(8).round(4))
    mlflow.log_params(result.params)
    mlflow.log_metric(f"valid_{metric}", result.value)
    example = train[[*numeric, *categorical]]
    inputs = inputs_from(features_contract(), train, list(example))
    tables = {"split/flights": version}
    marks = {"split/flights": version_mark(lake, "split/flights", version)}
    about = {"candidate": candidate, "seed": seed, f"valid_{metric}": result.value, "tables": tables, "marks": marks}
    uri = log_model(result.pipeline, example, name=candidate, metadata=about, inputs=inputs)
    return {"candidate": candidate, "model_uri": uri, f"valid_{metric}": result.value, "tables": tables}


def evaluate_step(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    "What 22_evaluate does"
    rules, lake = load_settings().promotion, open_lake()
    logged = logged_candidates(candidates)
    best = best_candidate(logged, rules.metric)
    name, uri = best["candidate"], best["uri"]
    serving = opponent(MODEL, uri)
    number = serving.version if serving else 0
    models = {one["candidate"]: load_logged(one["uri"]) for one in logged}
    origins = {one["candidate"]: (one["tables"], one.get("marks", {})) for one in logged}
    if serving:
        models["champion"], origins["champion"] = load_model(MODEL, number), (serving.tables, serving.marks)
    learners = [Learner(who, list(one.columns), *origins[who]) for who, one in models.items()]
    fair = fair_rows(lake, flights_holdout, learners, rules)
    print(fair.rows.groupby("month")["late"].agg(flights="size", late="mean").round(3))
    scores = {who: probability(one.pipeline, fair.rows) for who, one in models.items() if fair.fits(one.columns)}
    groups = fair.rows[["origin", "carrier"]]
    evaluations = {who: evaluate(fair.rows["late"], p, groups, blocks=fair.blocks) for who, p in scores.items()}
    print(compare_models(evaluations)[SHOWN].round(4))
    draw(plot_evaluations(evaluations))
    months = fair.rows["month"].unique()
    alarms = count_alarms(read_history(lake, f"monitoring/{MODEL}", "month"), months, number, "month")
    uses = count_uses(MODEL, uri, fair, "late", alarms)
    found = compare(fair, "late", scores[name], scores.get("champion"), rules, number, uses, alarms)
    print(found.table(rules).round(4))
    draw(plot_comparison(found, rules))
    draw(plot_slices(evaluations[name], "carrier"))
    print(evaluations[name].slices.query("column == 'origin'").round(3))
    metrics = {key: evaluations[name].metrics[key] for key in SHOWN}
    mlflow.log_metrics(metrics, model_id=uri.removeprefix("models:/"))
    return {"candidate": name, "model_uri": uri, "tables": best["tables"], "metrics": metrics, "found": found}


def register_step(winner: dict[str, Any]) -> None:
    "What 24_register does"
    rules, tags = load_settings().promotion, {"candidate": winner["candidate"]}
    found: Comparison = winner["found"]
    challenger = submit(winner["model_uri"], MODEL, winner["tables"], winner["metrics"], tags)
    ruling = promote(MODEL, challenger.version, found, rules)
    found = replace(found, uses=ruling.details["uses"])
    print(f"{ruling.event}: {ruling.why}")
    print(found.table(rules).round(4))
    draw(plot_comparison(found, rules))
    print(history(MODEL).drop(columns="created").head(5).round(4))


def main(candidates: list[str], budget: int, seed: int) -> None:
    "The whole pipeline, a run for each step"
    connect()
    trained = []
    for name in candidates:
        with mlflow.start_run(run_name=f"train [{name}]"):
            trained.append(train_step(name, budget, seed))
    with mlflow.start_run(run_name="evaluate"):
        winner = evaluate_step(trained)
    with mlflow.start_run(run_name="register"):
        register_step(winner)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
