"""The example pipelines as a user runs them, on one small month, and what MLflow and the lake hold afterwards."""

import pandas as pd
import pytest
from conftest import commit, example_project, git

RUN = ("run", "flights_etl", "flights_train", "-p", "months=2013-02", "-p", "budget=1")
CANDIDATES = ("logistic_regression", "random_forest", "hist_gradient_boosting")


@pytest.fixture(scope="module")
def flights(tmp_path_factory, stores):
    "A project in git with the real DAGs and notebooks, in which both pipelines ran twice"
    project = example_project(tmp_path_factory.mktemp("flights"), stores)
    (project.root / ".gitignore").write_text("var\n")
    git(project, "init", "-q")
    commit(project, "first")
    project.outputs = [project.mlpkg(*RUN), project.mlpkg(*RUN)]
    return project


def lake(project):
    from mlpkg.data.lake import Lake

    return Lake(project.settings.lake.root)


def test_every_step_is_recorded(flights):
    for dag, steps in {
        "flights_etl": ["ingest", "validate", "clean", "split"],
        "flights_train": [*(f"train [{name}]" for name in CANDIDATES), "evaluate", "register"],
    }.items():
        runs = flights.pipeline_runs(dag)
        assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
        for run in runs:
            found = flights.steps(run)
            assert sorted(found) == sorted(steps)
            for step in found.values():
                assert step.info.status == "FINISHED"
                assert {name.partition(".")[2] for name in flights.artifacts(step)} == {"ipynb", "html"}
                assert step.data.metrics["seconds"] > 0
                tags = {"mlpkg.notebook", "mlpkg.notebook_digest", "mlflow.source.git.commit", "mlpkg.git_dirty"}
                assert tags | {"mlpkg.lock_digest", "mlpkg.host"} <= step.data.tags.keys()


def test_a_replay_agrees_to_the_digit(flights):
    for dag, steps in (("flights_etl", 4), ("flights_train", 5)):
        newest, oldest = flights.pipeline_runs(dag)
        output = flights.mlpkg("replay", oldest.info.run_id, timeout=900)
        assert f"{steps} of {steps} steps agree to the digit" in " ".join(output.split())
        assert [run.info.run_id for run in flights.pipeline_runs(dag)] == [newest.info.run_id, oldest.info.run_id]


def test_running_a_month_twice_leaves_one_copy(flights):
    tables = lake(flights)
    rows = tables.read("raw/flights", columns=["month"])
    assert rows["month"].unique().tolist() == ["2013-02"]
    assert tables.count("raw/flights") == 24951  # as many as the source has
    assert tables.count("clean/flights") + tables.count("quarantine/raw/flights") == 24951


def test_steps_name_the_tables_they_used(flights):
    clean = flights.steps(flights.pipeline_runs("flights_etl")[0])["clean"]
    uses = {(d.dataset.name, d.tags[0].value) for d in clean.inputs.dataset_inputs}
    assert {("raw/flights", "read"), ("raw/weather", "read"), ("clean/flights", "write")} <= uses
    assert lake(flights).lineage("clean/flights") == clean.info.run_id


def test_the_model_is_registered_and_its_metrics_are_plausible(flights):
    newest, oldest = flights.pipeline_runs("flights_train")
    first, second = (flights.steps(run)["register"] for run in (oldest, newest))
    model = flights.mlflow.get_registered_model("flights")
    tags = flights.mlflow.get_model_version("flights", "1").tags
    assert len(tags["mark.split/flights"].split()) == 2, "the table and its commit"
    assert model.aliases["champion"] == 1, "the same data and seed do not make a better model"
    assert first.data.metrics["version"] == 1 and second.data.metrics["version"] == 2
    assert 0.55 < first.data.metrics["metrics.roc_auc"] < 0.75, "far more than that means a leak"
    assert "Model flights version 1, alias champion" in flights.outputs[0]
    assert "champion so far" in flights.outputs[1]


def test_the_same_data_and_seed_give_the_same_numbers(flights):
    newest, oldest = flights.pipeline_runs("flights_train")
    first, second = flights.steps(oldest)["evaluate"].data.metrics, flights.steps(newest)["evaluate"].data.metrics
    metrics = [name for name in first if name.startswith("metrics.")]
    assert len(metrics) >= 5
    assert {name: first[name] for name in metrics} == {name: second[name] for name in metrics}


def test_a_candidate_whose_model_carries_no_score_is_judged_by_what_its_step_glued(flights):
    import mlflow

    from mlpkg.models.registry import load_model
    from mlpkg.models.storage import log_model
    from mlpkg.steps.run import run_step
    from mlpkg.steps.tracking import connect

    connect(flights.settings)
    loaded = load_model("flights")
    example = lake(flights).read("split/flights", columns=list(loaded.columns))[:50]
    with mlflow.start_run():
        uri = log_model(loaded.pipeline, example, inputs=loaded.inputs)
    glued = {"candidate": "older", "model_uri": uri, "valid_roc_auc": 0.61, "tables": {"split/flights": 0}}
    notebook = flights.root / "nbs/pipelines/flights/22_evaluate.ipynb"
    scraps = run_step(notebook, {"candidates": [glued]}, settings=flights.settings).scraps
    assert (scraps["candidate"], scraps["tables"]) == ("older", {"split/flights": 0})


def test_a_broken_step_keeps_the_champion_and_says_where(flights):
    import nbformat

    path = flights.root / "nbs/pipelines/flights/22_evaluate.ipynb"
    sound = path.read_text()
    nb = nbformat.reads(sound, as_version=4)
    nb.cells[-1].source = "raise RuntimeError('broken on purpose')\n" + nb.cells[-1].source
    nbformat.write(nb, path)
    output = flights.mlpkg("run", "flights_train", "-p", 'candidates=["logistic_regression"]', "-p", "budget=0", code=1)
    path.write_text(sound)

    run = flights.pipeline_runs("flights_train")[0]
    steps = flights.steps(run)
    assert run.info.status == "FAILED" and "register" not in steps
    assert "RuntimeError: broken on purpose" in steps["evaluate"].data.tags["mlpkg.failure.error"]
    assert f"cell {len(nb.cells)}" in steps["evaluate"].data.tags["mlpkg.failure.cell"]
    assert flights.artifacts(steps["evaluate"]) == ["evaluate.html", "evaluate.ipynb"]
    assert "flights_train failed" in output and "broken on purpose" in output
    assert flights.mlflow.get_registered_model("flights").aliases["champion"] == 1


def test_an_alarm_stays_open_until_a_training_succeeds(flights, monkeypatch):
    from mlpkg.steps.run import run_step

    assert flights.pipeline_runs("flights_train")[0].info.status == "FAILED", "the last training failed"
    row = {"month": ["2013-02"], "model_version": [1], "check": ["contract"], "alarm": [True]}
    row["words"] = ["late flights rose"]
    lake(flights).write("monitoring/flights", pd.DataFrame(row), mode="replace", partition={"month": "2013-02"})
    monkeypatch.setenv("MLPKG_AIRFLOW__RETRAIN_WAIT", "0.0000001")  # hours
    watch = run_step(flights.root / "nbs/pipelines/flights/40_watch.ipynb", settings=flights.settings)
    assert watch.scraps["retrain"] is True
    assert watch.scraps["verdict"] == "unanswered alarm of 2013-02: late flights rose"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.csv", None, "missing.csv"),
        ("empty.csv", "", "empty"),
        ("columns.csv", "year,month\n2013,2\n", "columns"),
    ],
)
def test_bad_input_stops_the_step_and_writes_nothing(flights, name, content, says):
    from mlpkg.steps.execution import StepError
    from mlpkg.steps.run import run_step

    before, source = lake(flights).version("raw/flights"), flights.root / name
    if content is not None:
        source.write_text(content)
    notebook = flights.root / "nbs/pipelines/flights/10_ingest.ipynb"
    with pytest.raises(StepError, match=says):
        run_step(notebook, {"source": str(source), "months": "2013-02"}, settings=flights.settings)
    assert lake(flights).version("raw/flights") == before


@pytest.fixture
def contest(project):
    "A project whose model `flights` has a champion and a challenger"
    import mlflow

    from mlpkg.models.oversight import promote_by_hand
    from mlpkg.models.registry import register
    from mlpkg.models.storage import log_model
    from mlpkg.models.training import fit
    from mlpkg.steps.tracking import connect
    from mlpkg.testing import parcels

    connect(project.settings)
    table = parcels(300)
    pipeline = fit("logistic_regression", table, "late", ["distance"], [])
    with mlflow.start_run():
        project.uris = [log_model(pipeline, table[["distance"]]) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLPKG_SETTINGS", str(project.root / "settings.ini"))
        for uri, roc_auc in zip(project.uris, (0.70, 0.75), strict=True):
            version = register(uri, "flights", {"split/flights": 1}, {"roc_auc": roc_auc})
            if version == 1:
                promote_by_hand("flights", 1, "the first")
        yield project


def run_register(project, **parameters):
    "Run the register step alone"
    from conftest import ROOT

    from mlpkg.steps.run import run_step

    return run_step(ROOT / "nbs/pipelines/flights/24_register.ipynb", parameters, settings=project.settings)


def register_alone(project, **parameters) -> dict:
    "Run the register step alone and return what it glued"
    return run_register(project, **parameters).scraps


def comparison(error: float) -> dict:
    "A comparison with version 1 that found a gain of 0.02 in ROC AUC with this standard error"
    gain, alike = {"value": 0.02, "error": error, "freedom": 30.0}, {"value": 0.0, "error": 0.001, "freedom": 30.0}
    return {
        "problem": "",
        "metrics": {"roc_auc": 0.68, "brier": 0.1},
        "champion": 1,
        "champion_metrics": {"roc_auc": 0.66, "brier": 0.1},
        "gains": {"roc_auc": gain, "brier": alike},
        "quality": {"roc_auc": {"value": 0.68, "error": 0.01, "freedom": 30.0}},
    }


def test_the_register_step_changes_nothing_unless_told_and_decides_on_the_comparison_of_this_run(contest):
    def registry():
        model = contest.mlflow.get_registered_model("flights")
        return dict(model.aliases), [contest.mlflow.get_model_version("flights", str(n)).tags for n in (1, 2)]

    before = registry()
    scraps = register_alone(contest)
    assert registry() == before
    assert scraps["promoted"] is False and "nothing was compared" in scraps["reason"]

    fresh, found = {"model_uri": contest.uris[1], "metrics": {"roc_auc": 0.68}}, comparison(error=0.02)
    scraps = register_alone(contest, **fresh, comparison=found)
    assert scraps["promoted"] is False and "0.6800 against the champion's 0.6600" in scraps["reason"]
    assert scraps["metrics"] == {"roc_auc": 0.68} and scraps["champion_metrics"] == {"roc_auc": 0.66}
    scraps = register_alone(contest, **fresh, comparison=comparison(error=0.001))
    assert scraps["promoted"] is True and contest.mlflow.get_registered_model("flights").aliases["champion"] == 2


def test_the_register_step_shows_the_decision_that_was_recorded(contest):
    "Another training has decided since the evaluation, so the gain would have won before and no longer does"
    from mlpkg.models.comparison import as_comparison, decide
    from mlpkg.models.promotion import promote

    found, rules = {**comparison(error=0.0085), "marks": ["a day"]}, contest.settings.promotion
    assert decide(as_comparison(found), rules).promote
    assert promote("flights", 2, as_comparison({**comparison(error=0.1), "marks": ["a day"]}), rules).event == "refused"
    step = run_register(contest, model_uri=contest.uris[1], metrics={"roc_auc": 0.68}, comparison=found)
    assert step.scraps["promoted"] is False
    outputs = [
        output
        for cell in contest.stored(contest.mlflow.get_run(step.run_id)).cells
        for output in cell.get("outputs", [])
    ]
    (table,) = (o["data"]["text/plain"] for o in outputs if "because" in o.get("data", {}).get("text/plain", ""))
    assert "use 2 of these rows" in table and "refused" in table and "promote\n" not in table


def evaluated(project, features: list[str], version: int) -> dict:
    "Evaluate a small model that takes these columns of a version of the split, and return what was glued"
    import mlflow

    from mlpkg.models.storage import log_model
    from mlpkg.models.training import fit
    from mlpkg.steps.run import run_step

    parts = lake(project).read("split/flights", version=version)
    pipeline = fit("logistic_regression", parts[parts["part"] == "train"].head(2000), "late", features, [])
    with mlflow.start_run():
        uri = log_model(pipeline, parts[features].head(50))
    glued = {"candidate": "small", "model_uri": uri, "valid_roc_auc": 0.6, "tables": {"split/flights": version}}
    notebook = project.root / "nbs/pipelines/flights/22_evaluate.ipynb"
    return run_step(notebook, {"candidates": [glued]}, settings=project.settings).scraps


def test_a_feature_that_is_removed_or_renamed_does_not_stop_training(flights):
    from mlpkg.steps.tracking import connect

    connect(flights.settings)
    parts = lake(flights).read("split/flights")
    write = {"name": "split/flights", "mode": "overwrite", "change_schema": True}
    removed = lake(flights).write(data=parts.drop(columns="visib"), **write)
    found = evaluated(flights, ["distance", "sched_hour"], removed)["comparison"]
    assert found["problem"] == "" and found["champion"] == 1, "both are scored on a version that has the column"
    renamed = lake(flights).write(data=parts.rename(columns={"visib": "sight"}), **write)
    found = evaluated(flights, ["distance", "sight"], renamed)["comparison"]
    assert "champion (version 1) takes visib" in found["problem"] and "mlpkg promote VERSION" in found["problem"]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_rows_that_a_model_has_learned_from_do_not_judge_it(flights, part):
    from mlpkg.steps.tracking import connect

    connect(flights.settings)
    parts = lake(flights).read("split/flights", version=0)
    late = parts["part"].where(parts["part"] != "holdout", part)  # somebody has trained on all days
    version = lake(flights).write("split/flights", parts.assign(part=late), mode="overwrite", change_schema=True)
    lake(flights).write("split/flights", parts, mode="overwrite")
    found = evaluated(flights, ["distance", "sched_hour"], version)["comparison"]
    assert "too little to judge by: 0 rows" in found["problem"] and "has learned from them" in found["problem"]


def test_where_nothing_is_compared_the_metrics_are_of_rows_that_the_model_has_not_learned_from(flights):
    "A feature is dropped and a month comes in: the champion can only be scored on the month learned from since"
    from mlpkg.models.evaluation import evaluate
    from mlpkg.models.registry import load_logged
    from mlpkg.steps.tracking import connect

    connect(flights.settings)
    before = lake(flights).read("split/flights", version=0)
    later = before[before["part"] == "holdout"].assign(month="2013-09", late=lambda rows: 1 - rows["late"])
    parts = pd.concat([before.assign(part="train"), later.assign(part="holdout")]).drop(columns="visib")
    version = lake(flights).write("split/flights", parts, mode="overwrite", change_schema=True)
    scraps = evaluated(flights, ["distance", "sched_hour"], version)
    assert "has learned from them" in scraps["comparison"]["problem"]
    probabilities = load_logged(scraps["model_uri"]).pipeline.predict_proba(later)[:, 1]
    assert scraps["metrics"]["roc_auc"] == pytest.approx(evaluate(later["late"], probabilities).metrics["roc_auc"])

    lake(flights).write("split/flights", parts.assign(part="train"), mode="overwrite")
    assert evaluated(flights, ["distance", "sched_hour"], version + 1)["metrics"] == {}


def test_an_alarm_about_the_champion_is_counted_as_a_use_of_the_days_that_judge(flights):
    parts = lake(flights).read("split/flights", version=0)
    version = lake(flights).write("split/flights", parts, mode="overwrite", change_schema=True)
    before = evaluated(flights, ["distance", "sched_hour"], version)["comparison"]
    row = {"month": ["2013-02"], "model_version": [1], "check": ["performance"], "alarm": [True]}
    row["words"] = ["the champion does badly"]
    lake(flights).write("monitoring/flights", pd.DataFrame(row), mode="replace", partition={"month": "2013-02"})
    after = evaluated(flights, ["distance", "sched_hour"], version)["comparison"]
    assert (before["problem"], before["alarms"], after["alarms"]) == ("", 0, 1)
    assert after["uses"] == before["uses"] + 1
