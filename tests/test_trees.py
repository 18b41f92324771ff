"""Tree models for a few rows: what scikit-learn says, to the last bit, or scikit-learn itself."""

import logging

import numpy as np
import pytest
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from treelite import gtil

from mlpkg.models import trees
from mlpkg.models.trees import FastTrees, edge_rows, fast_trees

RNG = np.random.default_rng(7)
X = np.round(RNG.normal(size=(2000, 6)), 2)
X[RNG.random(X.shape) < 0.1] = np.nan
SCORE = np.nan_to_num(X[:, 0]) + np.nan_to_num(X[:, 1]) ** 2 + RNG.normal(size=len(X))
LABELS = {"two": (SCORE > 1).astype(int), "four": np.digitize(SCORE, [0, 1, 2]), "number": np.exp(SCORE)}
MODELS = {
    "forest": (RandomForestClassifier(30, random_state=0), RandomForestRegressor(30, random_state=0)),
    "extra": (ExtraTreesClassifier(30, random_state=0), ExtraTreesRegressor(30, random_state=0)),
    "boosted": (HistGradientBoostingClassifier(max_iter=40), HistGradientBoostingRegressor(max_iter=40)),
    "counts": (None, HistGradientBoostingRegressor(loss="poisson", max_iter=40)),
    "weighted": (RandomForestClassifier(30, class_weight="balanced", random_state=0), None),
    "threads": (RandomForestClassifier(30, n_jobs=2, random_state=0).set_params(n_jobs=1), None),
}


@pytest.mark.parametrize(
    ("name", "label"),
    [(name, label) for name in MODELS for label in LABELS if MODELS[name][label == "number"] is not None],
)
def test_each_answer_is_that_of_scikit_learn_to_the_last_bit(name, label):
    model = MODELS[name][label == "number"].fit(X[:1500], LABELS[label][:1500])
    fast, ask = fast_trees(model), "predict" if label == "number" else "predict_proba"
    assert isinstance(fast, FastTrees)
    for rows in (X[1500:], X[1500:1501], np.asfortranarray(X[:9]), edge_rows(fast.trees, 6, 3000)[1000:]):
        said = getattr(fast, ask)(rows)
        assert said.dtype == np.float64
        np.testing.assert_array_equal(said, getattr(model, ask)(rows))


def test_a_target_on_another_scale_is_given_back():
    model = TransformedTargetRegressor(
        HistGradientBoostingRegressor(max_iter=40), func=np.log1p, inverse_func=np.expm1
    ).fit(X, LABELS["number"])
    fast = fast_trees(model)
    assert isinstance(fast.regressor_, FastTrees) and not isinstance(model.regressor_, FastTrees)
    np.testing.assert_array_equal(fast.predict(X[:50]), model.predict(X[:50]))


@pytest.mark.parametrize("seed", range(5))
def test_categories_of_boosting_are_read_alike_or_not_at_all(seed):
    "A category that was never seen is missing to scikit-learn"
    rng = np.random.default_rng(seed)
    rows = np.column_stack([rng.integers(0, 12, 800).astype(float), rng.normal(size=800)])
    y = (np.isin(rows[:, 0], [1, 4, 5, 9]) + rows[:, 1] > 0.5).astype(int)
    model = HistGradientBoostingClassifier(max_iter=20, categorical_features=[0]).fit(rows, y)
    asked = np.array([[code, 0.1] for code in (*range(12), 13, 40, np.nan, -1)])
    fast = fast_trees(model)
    if fast is not None:
        np.testing.assert_array_equal(fast.predict_proba(asked), model.predict_proba(asked))


class Shifted(RandomForestClassifier):
    "A forest that says something else than its trees"

    def predict_proba(self, X):
        return super().predict_proba(X)[:, ::-1]


def test_a_model_that_says_something_else_is_left_alone(caplog):
    with caplog.at_level(logging.WARNING, "mlpkg.models.trees"):
        assert fast_trees(Shifted(5, random_state=0).fit(X, LABELS["two"])) is None
    assert "is not read alike by treelite, so scikit-learn answers for single rows, too" in caplog.text


def test_a_model_that_would_take_much_memory_is_left_alone(monkeypatch, caplog):
    model = RandomForestClassifier(5, random_state=0).fit(X, LABELS["two"])
    assert trees._most_bytes == 2**27
    monkeypatch.setattr(trees, "_most_bytes", trees._size_of(model))
    assert isinstance(fast_trees(model), FastTrees) and not caplog.records
    monkeypatch.setattr(trees, "_most_bytes", trees._size_of(model) - 1)
    assert fast_trees(model) is None
    [said] = caplog.records
    assert said.levelno == logging.WARNING
    assert (
        "MB more, of at most" in said.getMessage() and "scikit-learn answers for single rows, too" in said.getMessage()
    )


@pytest.mark.parametrize(("name", "label"), [("forest", "two"), ("forest", "number"), ("boosted", "two")])
def test_a_wrong_leaf_is_found_when_a_model_is_loaded(name, label, monkeypatch, caplog):
    "As if treelite had read one of thousands in another way"
    model, read = MODELS[name][label == "number"].fit(X, LABELS[label]), FastTrees.__init__

    def misread(fast, model):
        read(fast, model)
        tree = fast.trees.get_tree_accessor(0)
        leaf = gtil.predict_leaf(fast.trees, edge_rows(fast.trees, 6)[-1:], nthread=1).astype(int)[0, 0]
        if name == "forest":
            fast.values[leaf] = fast.values[leaf][::-1] + 1e-9
        else:
            values = tree.get_field("leaf_value").copy()
            values[leaf] += 1e-9
            tree.set_field("leaf_value", values)

    assert isinstance(fast_trees(model), FastTrees)
    monkeypatch.setattr(FastTrees, "__init__", misread)
    assert fast_trees(model) is None and "is not read alike by treelite" in caplog.text


@pytest.mark.parametrize("name", ["forest", "extra"])
def test_a_wrong_node_that_no_row_reaches_is_found(name, monkeypatch):
    model, read = MODELS[name][1].fit(X, LABELS["number"]), FastTrees.__init__

    def misread(fast, model):
        read(fast, model)
        tree, rows = model.estimators_[0].tree_, edge_rows(fast.trees, 6).astype("float32")
        reached = np.asarray(tree.decision_path(rows).sum(axis=0)).ravel()
        [node, *_] = np.flatnonzero((reached == 0) & (tree.children_left >= 0))
        found = fast.trees.get_tree_accessor(0)
        edges = found.get_field("threshold").copy()
        edges[node] += 1e-9
        found.set_field("threshold", edges)

    assert isinstance(fast_trees(model), FastTrees)
    monkeypatch.setattr(FastTrees, "__init__", misread)
    assert fast_trees(model) is None


def test_what_a_forest_refuses_is_refused():
    fast = fast_trees(RandomForestClassifier(5, random_state=0).fit(X, LABELS["two"]))
    for far in (np.inf, 1e300):
        with pytest.raises(ValueError, match="infinity or a value too large"):
            fast.predict_proba(np.full((1, 6), far))


def test_several_outputs_and_other_models_are_left_to_scikit_learn():
    both = np.column_stack([LABELS["two"], LABELS["four"]])
    assert fast_trees(RandomForestClassifier(5).fit(X, both)) is None
