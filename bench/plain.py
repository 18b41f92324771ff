"""The training pipeline as one plain script: the limit that no way of running notebooks can beat.

Makes the library calls of the step notebooks in the same order, and draws what they show, without a kernel.
"""

import io
import json
import sys
from typing import Any

import matplotlib

matplotlib.use("agg")

import mlflow
from matplotlib.figure import Figure

from mlpkg.data.inputs import inputs_from
from mlpkg.data.lake import open_lake
from mlpkg.examples.flights import categorical, features_contract, flights_holdout, numeric
from mlpkg.models.evaluation import compare_models, evaluate, plot_evaluations, plot_slices
from mlpkg.models.holdout import Learner, fair_rows
from mlpkg.models.oversight import history
from mlpkg.models.promotion import Comparison, compare, count_uses, decide, opponent, plot_comparison, promote, submit
from mlpkg.models.registry import load_logged, load_model
from mlpkg.models.scoring import probability
from mlpkg.models.storage import log_model
from mlpkg.models.training import importances, plot_trials, search
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
    lake = open_lake()
    version = lake.version("split/flights")
    parts = lake.read("split/flights", filters=[("part", "in", ["train", "validation"])], version=version)
    train, valid = parts[parts.part == "train"], parts[parts.part == "validation"]
    print(parts.groupby(["part", "month"])["late"].agg(flights="size", late="mean").round(3))
    result = search(
        candidate, train, valid, "late", numeric, categorical, budget=budget, seed=seed, row_cap=60_000,
        on_trial=lambda trial: mlflow.log_metric("trial_roc_auc", trial.value, step=trial.number),
    )  # fmt: skip
    mlflow.log_table(result.trials, "trials.json")
    draw(plot_trials(result).figure)
    print(importances(result.pipeline, valid, "late", numeric, categorical, seed=seed).head(8).round(4))
    mlflow.log_params(result.params)
    mlflow.log_metric("valid_roc_auc", result.value)
    example = train[[*numeric, *categorical]]
    inputs = inputs_from(features_contract(), train, list(example))
    tables = {"split/flights": version}
    about = {"candidate": candidate, "seed": seed, "valid_roc_auc": result.value, "tables": tables}
    uri = log_model(result.pipeline, example, name=candidate, metadata=about, inputs=inputs)
    return {"candidate": candidate, "model_uri": uri, "valid_roc_auc": result.value, "tables": tables}


def evaluate_step(candidates: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    "What 22_evaluate does"
    rules, lake = load_settings().promotion, open_lake()
    infos = [mlflow.models.get_model_info(one["model_uri"]) for one in candidates]
    best = max(infos, key=lambda info: info.metadata["valid_roc_auc"])
    name, uri = best.metadata["candidate"], f"models:/{best.model_id}"
    serving = opponent(MODEL, uri)
    number = serving.version if serving else 0
    models = {info.metadata["candidate"]: load_logged(info.model_uri) for info in infos}
    tables = {info.metadata["candidate"]: info.metadata["tables"] for info in infos}
    if serving:
        models["champion"], tables["champion"] = load_model(MODEL, number), serving.tables
    learners = [Learner(who, list(one.columns), tables[who]) for who, one in models.items()]
    fair = fair_rows(lake, flights_holdout, learners, rules)
    print(fair.rows.groupby("month")["late"].agg(flights="size", late="mean").round(3))
    scores = {who: probability(one.pipeline, fair.rows) for who, one in models.items() if fair.fits(one.columns)}
    groups = fair.rows[["origin", "carrier"]]
    evaluations = {who: evaluate(fair.rows["late"], p, groups, seed=seed) for who, p in scores.items()}
    print(compare_models(evaluations)[SHOWN].round(4))
    draw(plot_evaluations(evaluations))
    uses = count_uses(MODEL, uri, fair.blocks)
    found = compare(fair, "late", scores[name], scores.get("champion"), rules, uses, number)
    draw(plot_comparison(found, rules))
    draw(plot_slices(evaluations[name], "carrier"))
    print(evaluations[name].slices.query("column == 'origin'").round(3))
    metrics = {key: evaluations[name].metrics[key] for key in SHOWN}
    mlflow.log_metrics(metrics, model_id=best.model_id)
    return {"candidate": name, "model_uri": uri, "tables": tables[name], "metrics": metrics, "found": found}


def register_step(winner: dict[str, Any]) -> None:
    "What 24_register does"
    rules, tags = load_settings().promotion, {"candidate": winner["candidate"]}
    found: Comparison = winner["found"]
    challenger = submit(winner["model_uri"], MODEL, winner["tables"], winner["metrics"], tags)
    draw(plot_comparison(found, rules))
    promote(MODEL, challenger.version, decide(found, rules), found.champion or None, rules.approval, found)
    print(history(MODEL).drop(columns="created").head(5).round(4))


def main(candidates: list[str], budget: int, seed: int) -> None:
    "The whole pipeline, a run for each step"
    connect()
    trained = []
    for name in candidates:
        with mlflow.start_run(run_name=f"train [{name}]"):
            trained.append(train_step(name, budget, seed))
    with mlflow.start_run(run_name="evaluate"):
        winner = evaluate_step(trained, seed)
    with mlflow.start_run(run_name="register"):
        register_step(winner)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
