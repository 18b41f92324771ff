"""Models of all kinds from the label to the API: a price with its interval, and one of three wines.

Pages show each part by itself; here one model goes through all of them, on a lake and a registry of its own.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import mlflow
import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest
from fastapi.testclient import TestClient
from scipy.stats import norm
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression

from mlpkg.batch.predict import score
from mlpkg.batch.screening import BatchError
from mlpkg.batch.summary import plot_result
from mlpkg.data.inputs import inputs_from
from mlpkg.data.lake import Lake
from mlpkg.models.candidates import candidates, regressors
from mlpkg.models.comparison import compare, decide
from mlpkg.models.evaluation import compare_models, evaluate, objective
from mlpkg.models.holdout import FairRows
from mlpkg.models.oversight import promote_by_hand
from mlpkg.models.paired import gain, measure
from mlpkg.models.plots import plot_evaluations
from mlpkg.models.promotion import best_candidate, promote
from mlpkg.models.registry import RegistryError, load_model, register
from mlpkg.models.scoring import Scorer, raw_predictions
from mlpkg.models.storage import log_model
from mlpkg.models.tasks import Task, TaskError, infer_task
from mlpkg.models.training import SearchError, fit, search
from mlpkg.monitoring.performance import make_window
from mlpkg.monitoring.report import monitor
from mlpkg.quality import MetricError, choosing_metric
from mlpkg.serving.answer_log import LakeWriter, SegmentQueue
from mlpkg.serving.answers import Answer, new_request_id, to_line
from mlpkg.serving.app import create_app
from mlpkg.serving.comparison import compare_arms, plot_arms
from mlpkg.settings import MonitoringSettings, PromotionSettings, SettingsError, load_settings
from mlpkg.testing import TemporaryStore, parcels, temporary_store


@dataclass
class Case:
    "A question, and a table that answers it"

    name: str  # Of the registered model
    label: str
    task: Task
    table: pd.DataFrame
    numeric: list[str]
    categorical: list[str]
    contract: pa.DataFrameSchema

    @property
    def columns(self) -> list[str]:
        return [*self.numeric, *self.categorical]

    @property
    def candidates(self) -> list[str]:
        return sorted(regressors if self.task.kind == "regression" else candidates)

    def fit(self, candidate: str, seed: int = 0):
        return fit(candidate, self.table[:300], self.label, self.numeric, self.categorical, seed=seed, task=self.task)

    def log(self, pipeline, task: Task | None = None) -> str:
        inputs = inputs_from(self.contract, self.table, self.columns)
        return log_model(pipeline, self.table[self.columns], inputs=inputs, task=task or self.task)


def price_case() -> Case:
    "What a parcel costs: numbers, a category, missing values"
    table = parcels(900).assign(weight=lambda t: t.weight.astype(float))
    noise = np.random.default_rng(1).lognormal(0, 0.1, len(table))
    table["price"] = (5 + table.distance / 40 + table.weight.fillna(6)) * noise
    contract = pa.DataFrameSchema(
        {
            "distance": pa.Column(float, pa.Check.in_range(0, 1000), description="Distance, km"),
            "weight": pa.Column(float, pa.Check.ge(0), nullable=True, description="Weight, kg"),
            "carrier": pa.Column(str, nullable=True, description="Who delivers it"),
        }
    )
    task = replace(infer_task(table.price, "price"), scale="log")
    return Case("price", "price", task, table, ["distance", "weight"], ["carrier"], contract)


def wine_case() -> Case:
    "Which of three wines: 178 rows of scikit-learn's, three times, some values missing"
    data = load_wine(as_frame=True)
    names = ["alcohol", "color_intensity", "flavanoids", "proline"]
    table = data.data[names].assign(wine=data.target.map({0: "Barolo", 1: "Grignolino", 2: "Barbera"}))
    table = pd.concat([table] * 3, ignore_index=True).sample(frac=1, random_state=0, ignore_index=True)
    table.loc[np.random.default_rng(0).uniform(size=len(table)) < 0.1, "alcohol"] = np.nan
    contract = pa.DataFrameSchema({name: pa.Column(float, nullable=True, description=name) for name in names})
    return Case("wine", "wine", infer_task(table.wine, "wine"), table.assign(month="2026-01"), names, [], contract)


def named_case() -> Case:
    "Two classes that have names, of which the second in the alphabet is the positive one"
    case = price_case()
    table = case.table.assign(late=np.where(case.table.distance + 10 * case.table.weight.fillna(6) > 500, "yes", "no"))
    return replace(case, name="late", label="late", task=infer_task(table.late), table=table)


@pytest.fixture(scope="module", params=[price_case, wine_case, named_case], ids=["price", "wine", "named"])
def case(request) -> Case:
    return request.param()


@pytest.fixture
def store() -> Iterator[TemporaryStore]:
    with temporary_store() as made:
        yield made


def test_the_label_says_what_the_task_is():
    assert infer_task(price_case().table.price).kind == "regression"
    assert infer_task(wine_case().table.wine) == Task("multiclass", ("Barbera", "Barolo", "Grignolino"))


def test_every_candidate_predicts_alike_in_all_ways(case):
    inputs = inputs_from(case.contract, case.table, case.columns)
    rows = case.table[300:][case.columns]
    for name in case.candidates:
        pipeline = case.fit(name)
        raw = raw_predictions(pipeline, rows, case.task)
        assert case.task.is_sound(raw), name
        np.testing.assert_allclose(Scorer(pipeline, inputs, task=case.task).frame(rows), raw, rtol=1e-12, err_msg=name)
        np.testing.assert_array_equal(raw, raw_predictions(case.fit(name), rows, case.task), err_msg=name)


def test_those_that_learn_beat_the_baseline(case):
    rows = case.table[300:]
    found = {
        name: evaluate(rows[case.label], raw_predictions(case.fit(name), rows, case.task), task=case.task)
        for name in case.candidates
    }
    assert compare_models(found).index[-1] == "baseline"
    plot_evaluations({name: found[name] for name in case.candidates[:2]})


def test_a_small_table_is_searched_on_folds_and_the_interval_holds(case):
    rows = case.table[:300]
    found = search("random_forest", rows, None, case.label, case.numeric, case.categorical, budget=2, task=case.task)
    assert found.task.classes == case.task.classes
    if case.task.kind == "regression":
        later = case.table[300:]
        ends = found.task.bounds(raw_predictions(found.pipeline, later, case.task))
        held = ((ends["low"] <= later.price) & (later.price <= ends["high"])).mean()
        assert 0.85 < held < 0.96  # Promised are 90 % of 600 rows, measured on 300
        assert found.task.interval.rows == 300


def test_it_is_stored_with_the_model_and_kept_by_every_version(case, store):
    version = register(case.log(case.fit("random_forest")), case.name)
    loaded = load_model(case.name, version)
    assert (loaded.task, loaded.version.tags["task"]) == (case.task, case.task.kind)
    late = LogisticRegression().fit(case.table[case.numeric].fillna(0), case.table.index % 2)
    another = log_model(late, case.table[case.numeric])
    with pytest.raises(
        RegistryError, match=rf"version 1 is a {case.task.kind}.* model, and this one is a binary \(0, 1\)"
    ):
        register(another, case.name)


def test_four_classes_are_not_taken_for_two(store):
    rows = pd.DataFrame({"x": np.arange(100.0)})
    four = LogisticRegression().fit(rows, np.arange(100) % 4)
    with pytest.raises(TaskError, match="its classes are 0, 1, 2, 3. Store it with its task"):
        log_model(four, rows)
    old = mlflow.sklearn.log_model(four, name="old", serialization_format="skops", skops_trusted_types=["numpy.dtype"])
    version = register(old.model_uri, "old")  # as an earlier version of mlpkg has stored it
    with pytest.raises(TaskError, match="its classes are 0, 1, 2, 3"):
        load_model("old", version)


def test_a_challenger_is_compared_by_metrics_of_its_task(case, store):
    rows = case.table[300:].reset_index(drop=True)
    fair = FairRows(rows, pd.Series([f"day {row // 10}" for row in range(len(rows))]), 1, 0, table="split")
    weak, strong = (raw_predictions(case.fit(name), rows, case.task) for name in ("baseline", "random_forest"))
    rules = PromotionSettings()
    found = compare(fair, case.label, strong, weak, rules, 1, task=case.task)
    assert (found.kind, decide(found, rules).promote) == (case.task.kind, True)
    assert not decide(compare(fair, case.label, weak, strong, rules, 1, task=case.task), rules).promote
    wrong = PromotionSettings(minimum={"roc_auc" if case.task.kind == "regression" else "rmse": 0.6})
    with pytest.raises(
        TaskError, match="the challenger cannot be compared with the champion: it answers another question"
    ):
        compare(fair, case.label, strong, weak, rules, 1, task=case.task, other=Task("binary", (0, 1)))
    with pytest.raises(MetricError, match=f"does not judge {case.task.kind} models"):
        compare(fair, case.label, strong, weak, wrong, 1, task=case.task)
    register(case.log(case.fit("baseline")), case.name)
    version = register(case.log(case.fit("random_forest")), case.name)
    first = compare(fair, case.label, strong, None, rules, task=case.task)
    assert promote(case.name, version, first, rules).event == "promoted"


def test_batch_predictions_have_the_names_and_intervals_of_the_task(case, store, tmp_path):
    found = search(
        "random_forest", case.table[:300], None, case.label, case.numeric, case.categorical, budget=0, task=case.task
    )
    register(case.log(found.pipeline, found.task), case.name)
    promote_by_hand(case.name, 1, "the first")
    lake, rows = Lake(tmp_path / "lake"), case.table[300:].assign(month="2026-05", row=range(len(case.table) - 300))
    lake.write("clean", rows, mode="replace", partition={"month": "2026-05"})
    loaded = load_model(case.name)
    done = score(lake, loaded, "clean", "said", {"month": "2026-05"}, ["row"])
    said = lake.read("said").sort_values("row")
    raw = raw_predictions(loaded.pipeline, rows, case.task)
    for name, values in loaded.task.answers(raw).items():
        if values.dtype == object:
            assert said[name].tolist() == values.tolist()
        else:
            np.testing.assert_allclose(said[name], values, rtol=1e-12)
    assert set(done.means) == set(loaded.task.averages(raw))
    assert (len(said), done.quarantined) == (len(rows), 0)
    plot_result(done)
    if case.task.kind != "binary":
        with pytest.raises(BatchError, match=f"a {case.task.kind}.* model has none"):
            score(lake, loaded, "clean", "said", {"month": "2026-05"}, threshold=0.5)


def api_for(store: TemporaryStore, model: str, **serving: object) -> TestClient:
    "The application for one model"
    keys = {"model": model, "folder": store.folder / "serving", "poll_seconds": 3600, "log_seconds": 0.2, **serving}
    env = {f"MLPKG_SERVING__{name.upper()}": str(value) for name, value in keys.items()}
    env |= {"MLPKG_LAKE__ROOT": str(store.folder / "lake"), "MLPKG_TRACKING__URI": store.settings.tracking.uri}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return TestClient(create_app(load_settings(env=env)), "http://localhost", client=("127.0.0.1", 1))


def test_the_api_answers_as_its_document_says_and_takes_the_truth(case, store):
    found = search(
        "random_forest", case.table[:300], None, case.label, case.numeric, case.categorical, budget=0, task=case.task
    )
    for pipeline in (found.pipeline, case.fit("baseline")):
        register(case.log(pipeline, found.task), case.name)
    promote_by_hand(case.name, 1, "the first")
    rows = case.table[300:340]
    records = json.loads(rows[case.columns].to_json(orient="records"))
    with api_for(store, case.name, strategy="shadow") as api:
        answers = [api.post("/v1/predict", json={"records": records[at : at + 2]}) for at in range(0, 40, 2)]
        assert {answer.status_code for answer in answers} == {200}, answers[0].text
        said = [one for answer in answers for one in answer.json()["predictions"]]
        expected = found.task.records(raw_predictions(found.pipeline, rows, case.task))
        assert [one["prediction"] for one in said] == pytest.approx([one["prediction"] for one in expected])
        if case.task.kind == "regression":  # the interval is that of the size of the prediction, as in batches
            assert len(set(found.task.interval.reach)) == 3
            assert [(one["low"], one["high"]) for one in said] == [(one["low"], one["high"]) for one in expected]
        fields = api.get("/openapi.json").json()["components"]["schemas"]["Prediction"]["properties"]
        assert set(fields) == set(said[0])
        truths = [
            {"request_id": answers[place // 2].json()["request_id"], "record": place % 2, "truth": truth}
            for place, truth in enumerate(rows[case.label].tolist())
        ]
        strange = api.post("/v1/feedback", json={"truths": [{**truths[0], "truth": "Chianti"}]})
        assert strange.status_code == 422
        told = api.post("/v1/feedback", json={"truths": truths})
        assert len(told.json()["accepted"] + told.json()["waiting"]) == len(truths), told.text
        assert len(api.post("/v1/feedback", json={"truths": truths}).json()["repeated"]) == len(truths)
    lake = Lake(store.folder / "lake")
    served = lake.read(f"served/{case.name}")
    assert set(served["arm"]) == {"champion", "shadow"}
    assert ("kind" in served) == (case.task.kind != "binary")
    arms = compare_arms(lake, case.name)
    assert arms["with_truth"].tolist() == [40, 40]
    assert "the shadow is worse than the champion" in arms["words"].iloc[1]
    plot_arms(arms)


def test_a_metric_of_your_own_promotes_and_each_side_keeps_its_threshold(tmp_path, monkeypatch):
    (tmp_path / "own_costs.py").write_text(
        "from mlpkg.quality import metric\n\n\n"
        "@metric(('binary',), higher=False)\n"
        "def cost(y, p, weights):\n    return float((abs(y - (p > 0.5)) * weights).sum() / weights.sum())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    y = np.arange(200) % 2
    fair = FairRows(
        pd.DataFrame({"late": y}), pd.Series([f"day {row // 10}" for row in range(200)]), 1, 0, table="split"
    )
    ours, theirs = np.where(y == 1, 0.9, 0.1), np.random.default_rng(0).uniform(size=200)
    rules = PromotionSettings(metric="own_costs.cost", margin={"own_costs.cost": 0.01}, tolerance={})
    found = compare(fair, "late", ours, theirs, rules, 1)
    assert decide(found, rules).promote and "own_costs.cost 0.0000" in decide(found, rules).reasons[0]
    low = Task("binary", (0, 1), threshold=0.3)  # The champion separates the classes, at a threshold of its own
    rules = PromotionSettings(metric="f1", margin={"f1": 0}, tolerance={})
    found = compare(fair, "late", np.where(y == 1, 0.9, 0.1), np.where(y == 1, 0.4, 0.1), rules, 1, other=low)
    assert (found.champion_metrics["f1"], found.gains["f1"].value) == (1, 0)


def test_a_constant_is_no_champion_whatever_the_metric():
    price = np.random.default_rng(0).lognormal(3, 1, 400)
    fair = FairRows(pd.DataFrame({"price": price}), pd.Series([f"day {row // 10}" for row in range(400)]), 1, 0)
    for metric in ("mae", "rmse", "r2", "mape"):
        rules = PromotionSettings(metric=metric, margin={metric: 0}, tolerance={})
        for constant in (np.mean(price), np.median(price), np.quantile(price, 0.3)):
            found = compare(fair, "price", np.full(400, constant), None, rules, task=Task("regression"))
            assert not decide(found, rules).promote, (metric, constant)


def test_a_perfect_score_on_few_rows_is_not_certain():
    y = np.arange(40) % 2
    for metric in ("brier", "log_loss", "roc_auc"):
        assert np.isnan(measure(metric, y, y.astype(float), np.arange(40) // 5).bounds(0.95)).all()
    almost = np.where(np.arange(60) < 3, 0.5, np.arange(60) % 2)
    assert measure("brier", np.arange(60) % 2, almost, np.arange(60) // 10).bounds(0.95)[1] > 0.3


def test_a_perfect_score_is_not_certain_whatever_is_lost_by_rounding():
    for n in range(20, 70):
        y = np.arange(n) % 2
        p = np.where(y == 1, 0.9, 0.1) + np.linspace(0, 0.05, n)
        assert measure("roc_auc", y, p).error is None, n
        found = evaluate(y, p).metrics
        assert found["roc_auc"] == 1 and np.isnan([found["roc_auc_low"], found["roc_auc_high"]]).all(), n
    y = np.arange(33) % 2
    assert gain("brier", y, np.full(33, 0.5), np.full(33, 0.3) + 0.4 * y).error is None, "the same loss in every row"


def test_the_interval_of_few_rows_or_days_holds_as_often_as_it_says():
    true, held = 0.9, {"rows": 0, "days": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y, days = np.arange(60) % 5 == 0, np.repeat(np.arange(4), 15)
        p = norm.cdf(rng.normal(size=60) + y * norm.ppf(true) * 2**0.5)
        for name, blocks in (("rows", None), ("days", days)):
            found = evaluate(y, p, blocks=blocks).metrics
            held[name] += found["roc_auc_low"] <= true <= found["roc_auc_high"]
    assert min(held.values()) >= 56, held  # 57 of 60 is 95 %


def test_a_score_that_is_not_defined_is_an_error_and_does_not_win(store):
    table = price_case().table.assign(price=lambda t: t.price.where(t.index != 250, 0.0))
    score_by = objective("mape", Task("regression"))
    with pytest.raises(SearchError, match="ridge: the score is nan"):
        search("ridge", table[:200], table[200:], "price", ["distance"], [], task=Task("regression"), **score_by)
    with pytest.raises(RegistryError, match="has valid_mape NaN"):
        best_candidate([{"uri": "a", "valid_mape": float("nan")}, {"uri": "b", "valid_mape": 0.1}], "mape")
    with pytest.raises(MetricError, match="'pinball' cannot choose a model by itself"):
        choosing_metric("pinball")


def test_parts_in_which_a_class_or_an_outcome_is_missing():
    case = wine_case()
    table = case.table.assign(town=np.random.default_rng(0).choice(["A", "B"], len(case.table)))
    two = table[table.wine != "Barolo"]
    for name in case.candidates:
        pipeline = fit(name, two, "wine", case.numeric, ["town"], task=case.task)
        assert (raw_predictions(pipeline, table, case.task)[:, 1] == 0).all(), name
    rare = pd.DataFrame({"x": np.arange(200.0), "ward": np.arange(200) // 10, "ill": np.arange(200) // 10 % 7 == 0})
    assert search("logistic_regression", rare, None, "ill", ["x"], [], budget=0, group="ward").value > 0


def test_an_empty_segment_does_not_block_the_answers_of_other_models(tmp_path):
    lake, queue = Lake(tmp_path / "lake"), SegmentQueue(tmp_path / "answers")
    (queue.folder / "dead-000001.jsonl").write_bytes(b"")
    queue.adopt()
    now = datetime.now(UTC)
    one = Answer(new_request_id(), 0, now, "champion", "price", 1, 12.5, None, "{}", kind="regression", answer="{}")
    queue.append(to_line(one), 1)
    queue.rotate()
    writer = LakeWriter(lake, "served/price", queue)
    writer.deliver()
    assert lake.read("served/price")["prediction"].tolist() == [12.5]


def test_the_monitor_judges_models_of_every_task(case):
    table = case.table.sample(frac=1, random_state=1, ignore_index=True)
    pipeline = fit("random_forest", table[:200], case.label, case.numeric, case.categorical, task=case.task)
    inputs, rules = inputs_from(case.contract, table, case.columns), MonitoringSettings(min_rows=100)

    def window(rows, change=lambda values: values):
        raw = raw_predictions(pipeline, rows, case.task)
        return make_window(case.task, rows[case.columns], raw, change(rows[case.label]))

    def wrong(values):
        "Another truth for every second row"
        other = values * 1.5 if case.task.kind == "regression" else pd.Series(case.task.classes[0], index=values.index)
        return values.where(np.arange(len(values)) % 2 == 0, other)

    learned, held = (window(table[a:b]) for a, b in ((0, 200), (200, 360)))
    calm, bad = (
        monitor(learned, window(table[360:], change), inputs, rules, held, kind=case.task.kind)
        for change in (lambda v: v, wrong)
    )
    failed = [one.column for one in bad.at("alarm") if one.check == "performance"]
    assert not [one for one in calm.at("alarm") if one.check == "performance"] and failed


def test_a_model_that_answers_nonsense_is_not_believed(store):
    case = price_case()
    register(case.log(case.fit("ridge")), case.name)
    promote_by_hand(case.name, 1, "the first")
    record = json.loads(case.table[case.columns].head(1).to_json(orient="records"))
    with api_for(store, case.name) as api:
        champion = api.app.state.parts.loader.arms.champion
        object.__setattr__(
            champion.scorer, "model", type("Broken", (), {"predict": lambda self, X: [np.inf] * len(X)})()
        )
        answer = api.post("/v1/predict", json={"records": record})
    assert answer.status_code == 500
    assert "cannot say" in answer.json()["detail"]


@pytest.mark.parametrize(("value", "words"), [("auc", "unknown metric 'auc'"), ("recall", "cannot choose a model")])
def test_settings_take_exactly_the_metrics_that_there_are(tmp_path, value, words):
    with pytest.raises(SettingsError, match=words):
        load_settings(env={"MLPKG_PROMOTION__METRIC": value, "MLPKG_PROMOTION__MARGIN": f"{value}: 0.1"})
