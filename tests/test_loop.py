"""A simulation of two months: a model is trained, the data drifts, and a better model takes over by itself."""

import pytest
from conftest import example_project

RUN = ("simulate", "--from", "2013-11", "--to", "2013-12", "-p", "budget=0", "-p", "candidates=logistic_regression")


@pytest.fixture(scope="module")
def year(tmp_path_factory, stores):
    "A project with the real DAGs and notebooks, in which the two months were simulated"
    project = example_project(tmp_path_factory.mktemp("year"), stores)
    project.output = project.mlpkg(*RUN, timeout=600)
    return project


def tables(project):
    from mlpkg.data.lake import Lake

    return Lake(project.settings.lake.root)


def test_each_month_says_what_happened(year):
    first, second = (line for line in year.output.splitlines() if line.startswith("month "))
    assert "2013-11" in first and "champion" not in first and "challenger 1" in first and "promoted yes" in first
    assert "2013-12" in second and "alarm yes" in second and "champion 1" in second and "challenger 2" in second


def test_the_alarm_started_the_training_and_nothing_else_did(year):
    second, first = year.pipeline_runs("flights_train")
    assert first.data.params["reason"] == "no model yet"
    assert second.data.params["reason"].startswith("retrain: Alarm in 2013-12")
    (predicted_nothing, predicted) = reversed(year.pipeline_runs("flights_predict"))
    assert not year.steps(predicted_nothing), "without a champion there was nothing to predict with"
    assert year.steps(predicted)["predict"].info.status == "FINISHED"
    assert len(year.pipeline_runs("flights_monitor")) == 1


def test_the_month_was_predicted_by_the_model_of_that_time(year):
    found = tables(year).read("predictions/flights", columns=["month", "model_version", "probability"])
    assert found["month"].unique().tolist() == ["2013-12"] and found["model_version"].unique().tolist() == [1]
    assert len(found) > 27_000 and found["probability"].between(0, 1).all()


def test_the_version_knows_why_it_was_trained_and_what_it_beat(year):
    version = year.mlflow.get_model_version("flights", "2")
    assert version.tags["trained_for"].startswith("retrain: Alarm in 2013-12")
    assert version.tags["promotion.against"] == "1"
    assert version.tags["promotion"] in ("promoted", "refused")
    serving = year.mlflow.get_registered_model("flights").aliases["champion"]
    assert serving == (2 if version.tags["promotion"] == "promoted" else 1)


def test_a_month_whose_future_has_arrived_is_not_simulated(year):
    text = year.mlpkg("simulate", "--from", "2013-10", "--to", "2013-11", code=2)
    assert "a simulation from 2013-10 would know its future: flights_etl has run for 2013-12" in text


def test_the_picture_is_in_mlflow(year):
    experiment = year.mlflow.get_experiment_by_name("simulation")
    (run,) = year.mlflow.search_runs([experiment.experiment_id])
    assert {file.path for file in year.mlflow.list_artifacts(run.info.run_id)} == {"months.json", "months.png"}
