"""Promotion across processes, machines and crashes, and comparisons inside the noise: what a page cannot show.

Races need several processes that start together, a crash needs a process that dies. The tests of the ledger on S3 run
where AWS_ENDPOINT_URL (and credentials) point to a server; they make a bucket of their own.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import mlflow
import numpy as np
import pandas as pd
import pytest

from mlpkg.data.lake import Lake, open_lake
from mlpkg.data.ledger import Ledger
from mlpkg.models import oversight, record
from mlpkg.models.comparison import Comparison, ComparisonError, as_comparison, compare, decide
from mlpkg.models.evaluation import evaluate
from mlpkg.models.holdout import FairRows, Learner, block_marks, fair_rows
from mlpkg.models.oversight import history, hold, hold_of, missing_champion, promote_by_hand, release, rollback
from mlpkg.models.paired import Measurement, gain, measure
from mlpkg.models.promotion import count_uses, opponent, promote
from mlpkg.models.record import decisions, follow, registered_model
from mlpkg.models.registry import RegistryError, champion, get_version, register, versions
from mlpkg.models.splits import SplitRule
from mlpkg.models.storage import log_model
from mlpkg.models.tasks import Task, yes_no
from mlpkg.models.training import fit
from mlpkg.recipes.recipe import Recipe
from mlpkg.settings import PromotionSettings
from mlpkg.testing import parcels, temporary_store

spawn = multiprocessing.get_context("spawn")  # deltalake's runtime does not survive fork
rivals, rounds = 4, 5


def ledger_at(root: str) -> Ledger:
    return Ledger(Lake(root), "registry/tasks", {"round": "int64", "winner": "int64", "last": "int64"})


def take_rounds(root, barrier, me):
    "One of several processes: each round is for the first, who also notes whom it follows"
    ledger = ledger_at(root)
    for number in range(rounds):

        def take(lines, number=number):
            taken = any(line["round"] == number for line in lines)
            return None if taken else {"round": number, "winner": me, "last": len(lines)}

        barrier.wait()
        ledger.settle(take)


def add_once(root, barrier, me, results):
    "One of several processes that have all read the same commit"
    ledger = ledger_at(root)
    for _ in range(rounds):
        _, commit = ledger.read()
        barrier.wait()
        results.put((commit, me, ledger.add({"round": 0, "winner": me, "last": 0}, commit)))
        barrier.wait()


def race(target, *args) -> None:
    jobs = [spawn.Process(target=target, args=(args[0], args[1], me, *args[2:])) for me in range(rivals)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * rivals


def test_of_several_writers_that_read_the_same_commit_one_succeeds(root):
    results = spawn.Queue()
    race(add_once, root, spawn.Barrier(rivals), results)
    said = [results.get(timeout=5) for _ in range(rivals * rounds)]
    commits = sorted({commit for commit, _, _ in said})
    wins = {commit: [won for at, _, won in said if at == commit].count(True) for commit in commits}
    assert len(commits) == rounds and commits[0] == -1
    assert wins.pop(-1) <= 1, "a process that is late to make the table may disturb all others, once"
    assert set(wins.values()) == {1}
    lines, _ = ledger_at(root).read()
    assert [line["number"] for line in lines] == list(range(1, [won for *_, won in said].count(True) + 1))


def test_what_is_settled_is_settled_once(root):
    race(take_rounds, root, spawn.Barrier(rivals))
    lines, _ = ledger_at(root).read()
    assert [line["round"] for line in lines] == list(range(rounds))
    assert [line["last"] for line in lines] == list(range(rounds))


PROMOTE = """
import sys
from mlpkg.models.comparison import Comparison
from mlpkg.models.paired import Measurement
from mlpkg.models.promotion import promote
from mlpkg.models.registry import RegistryError
from mlpkg.recipes.recipe import Recipe
from mlpkg.settings import PromotionSettings
from mlpkg.steps.tracking import connect
name, version, against = sys.argv[1:]
connect()
gains = {metric: Measurement(0.1, 0.001, 30.0) for metric in ("roc_auc", "brier")}
won = Comparison("", {"roc_auc": 0.7, "brier": 0.2}, int(against), gains=gains)
print("ready", flush=True)
sys.stdin.readline()
try:
    print("won" if promote(name, int(version), won, PromotionSettings()).event == "promoted" else "refused")
except RegistryError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def store():
    "A temporary lake and MLflow store"
    with temporary_store() as store:
        yield store


@pytest.fixture(scope="module")
def uris(store) -> list[str]:
    "Three logged models"
    table = parcels(300)
    pipeline = fit("logistic_regression", table, "late", ["distance"], [])
    return [log_model(pipeline, table[["distance"]]) for _ in range(3)]


@pytest.fixture
def contest(uris, request):
    "A model with three versions, none of them champion, outside of any DAG run"
    belong_to("")
    return request.node.name, [register(uri, request.node.name) for uri in uris]


def belong_to(dag_run: str) -> None:
    "Let this process work for a DAG run"
    for tag, value in (("mlpkg.dag_id", "train"), ("mlpkg.dag_run_id", dag_run)):
        mlflow.set_tag(tag, value)
    if not dag_run:
        mlflow.MlflowClient().delete_tag(mlflow.active_run().info.run_id, "mlpkg.dag_run_id")


def aliases(name: str) -> dict[str, int]:
    return dict(mlflow.MlflowClient().get_registered_model(name).aliases)


rules = PromotionSettings()


def judged(against: int, gain: float) -> Comparison:
    "A comparison with a champion, or with nobody (0), that leaves no doubt"
    gains = {metric: Measurement(gain, 0.0001, 30.0) for metric in ("roc_auc", "brier")}
    return Comparison(
        "", {"roc_auc": 0.7, "brier": 0.2}, against, {"roc_auc": 0.6, "brier": 0.25} if against else {}, gains
    )


def win(against: int = 0) -> Comparison:
    return judged(against, 0.1)


def loss(against: int) -> Comparison:
    return judged(against, 0.0)


def compete(name: str, against: int, challengers: tuple[int, ...]) -> list[str]:
    "Promote versions at the same time, each in a process with a temporary folder of its own, as on several machines"
    rivals = []
    for number in challengers:
        env = {**os.environ, "TMPDIR": tempfile.mkdtemp()}
        command = [sys.executable, "-c", PROMOTE, name, str(number), str(against)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        rivals.append(subprocess.Popen(command, env=env, **pipes))
    for rival in rivals:
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        rival.stdin.write("go\n")
        rival.stdin.flush()
    return [rival.communicate(timeout=120)[0].strip() for rival in rivals]


def test_one_of_two_simultaneous_promotions_wins_and_the_other_is_told(contest):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    said = compete(name, one, (two, three))
    winner = (two, three)[said.index("won")]
    assert champion(name).version == aliases(name)["champion"] == winner
    (told,) = [words for words in said if words != "won"]
    assert f"was compared with version {one}, but version {winner} is champion by now" in told


def test_a_challenger_evaluated_when_nobody_served_does_not_replace_a_champion_promoted_meanwhile(contest):
    name, (one, two, three) = contest
    said = compete(name, 0, (one, two))
    winner = (one, two)[said.index("won")]
    assert champion(name).version == winner
    with pytest.raises(RegistryError, match=f"compared with no champion, but version {winner} is champion by now"):
        promote(name, three, win(), rules)


def test_a_reader_finds_a_champion_at_any_moment(contest):
    name, numbers = contest
    promote(name, numbers[0], win(), rules)
    seen, failures, done = set(), [], threading.Event()

    def ask():
        while not done.is_set():
            try:
                seen.add(int(mlflow.MlflowClient().get_model_version_by_alias(name, "champion").version))
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=ask)
    reader.start()
    for _ in range(3):
        for before, after in zip(numbers, [*numbers[1:], numbers[0]], strict=True):
            promote(name, after, win(before), rules)
    done.set()
    reader.join()
    assert failures == [] and seen == set(numbers)


@pytest.mark.parametrize("dies_at", ["the alias", "the tags"])
def test_a_crash_after_the_decision_is_mended_by_the_next_reader(contest, dies_at, monkeypatch):
    name, (one, two, _) = contest
    promote(name, one, win(), rules)
    broken = "set_registered_model_alias" if dies_at == "the alias" else "set_model_version_tag"

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, broken, die)
        with pytest.raises(KeyboardInterrupt):
            promote(name, two, win(one), rules)
    assert aliases(name)["champion"] == (one if dies_at == "the alias" else two)
    assert champion(name).version == aliases(name)["champion"] == two
    assert get_version(name, one).tags["replaced.by"] == str(two)
    assert rollback(name, "it was better before").version == one


def test_a_cleared_register_gives_the_same_decision_and_no_second_alias(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    belong_to("manual__1")
    assert opponent(name, uris[2]).version == one
    first = promote(name, three, win(one), rules)
    assert first.event == "promoted" and aliases(name) == {"champion": three}
    assert opponent(name, uris[2]).version == one, "never itself"
    assert register(uris[2], name) == three and aliases(name) == {"champion": three}
    again = promote(name, three, loss(three), rules)
    assert (again.event, again.number) == ("promoted", first.number)
    promote_by_hand(name, two, "the board decides")
    assert promote(name, three, win(one), rules).event == "promoted" and champion(name).version == two, "not again"
    belong_to("manual__2")
    assert opponent(name, uris[2]).version == two


def test_what_promotion_writes(contest):
    name, (one, two, three) = contest
    assert [v.aliases for v in versions(name)] == [("challenger",), (), ()]
    promote(name, three, win(), rules)
    assert get_version(name, three).aliases == ("champion",)
    assert promote(name, two, loss(three), rules).event == "refused"
    assert champion(name).version == three
    assert get_version(name, two).tags["promotion.against"] == str(three)
    assert get_version(name, three).tags["challenged.by"] == str(two)
    promote(name, one, win(three), rules)
    assert get_version(name, three).tags["replaced.why"].startswith("roc_auc 0.7000 against the champion's 0.6000")
    assert history(name)["promotion"].tolist() == ["promoted", "refused", "promoted"]


def test_a_champion_from_before_the_record_is_taken_over(contest):
    name, (one, two, three) = contest
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(one))
    assert champion(name).version == one
    with pytest.raises(RegistryError, match=f"but version {one} is champion by now"):
        promote(name, three, win(), rules)
    promote(name, two, win(one), rules)
    assert rollback(name, "as it was").version == one


def test_a_champion_that_was_deleted_in_mlflow_counts_as_none(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    promote(name, two, win(one), rules)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    assert opponent(name, uris[2]) is None
    with pytest.raises(RegistryError, match=f"compared with version {one}, but no version serves by now"):
        promote(name, three, win(one), rules)
    assert promote(name, three, win(), rules).event == "promoted"
    assert champion(name).version == three
    assert rollback(name, "too many complaints").version == one, "past the one that is gone"
    with pytest.raises(RegistryError, match="has no predecessor"):
        rollback(name, "even more complaints")


def test_a_rollback_from_a_champion_that_was_deleted_in_mlflow(contest):
    name, (one, two, _) = contest
    promote(name, one, win(), rules)
    promote(name, two, win(one), rules)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    assert rollback(name, "it is gone").version == one
    assert champion(name).version == one


def test_a_model_that_is_registered_anew_has_no_past(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    promote_by_hand(name, two, "the board decides", held=True)
    mlflow.MlflowClient().delete_registered_model(name)
    assert [register(uri, name) for uri in uris] == [one, two, three]
    assert aliases(name) == {"challenger": three}, "no version serves, and none has served"
    assert champion(name) is None
    assert promote(name, three, win(), rules).event == "promoted", "nobody holds the champion"
    assert champion(name).version == three
    with pytest.raises(RegistryError, match="has no predecessor"):
        rollback(name, "too many complaints")


def test_a_ruling_without_the_time_of_registration_counts_if_it_is_younger_than_the_model(contest, uris, monkeypatch):
    name, (one, two, _) = contest
    columns = {column: kind for column, kind in record._columns.items() if column != "registered"}
    ledger = Ledger(open_lake(), "registry/decisions", columns)
    old = {**dict.fromkeys(columns, ""), "model": name, "event": "by hand", "details": "{}"}
    before, now = "2020-02-02T02:02:02+00:00", datetime.now(UTC).isoformat(timespec="seconds")
    ledger.settle(lambda lines: {**old, "at": before, "version": two, "champion": two, "before": 0})
    assert "champion" not in follow(name).aliases
    ledger.settle(lambda lines: {**old, "at": now, "version": one, "champion": one, "before": 0})
    assert champion(name).version == one
    promote(name, two, win(one), rules)
    assert rollback(name, "it was better before").version == one


def test_a_lake_that_was_made_anew_begins_a_new_record(contest):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    promote(name, two, win(one), rules)
    shutil.rmtree(f"{open_lake().root}/registry")
    promote(name, three, win(two), rules)
    assert champion(name).version == three
    assert get_version(name, two).tags["replaced.by"] == str(three)
    assert rollback(name, "it was better before").version == two


def test_a_version_that_was_registered_after_the_decision_does_not_become_champion_by_it(contest, uris):
    "MLflow's database was restored from a backup that does not have the champion, whose number is given again"
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    (line,) = (line for line in decisions().read()[0] if line["model"] == name)
    past = datetime.fromisoformat(line["at"]) - timedelta(days=1)
    again = {"at": past.isoformat(), "version": three, "champion": three, "before": one}
    decisions().settle(lambda lines: {**{k: v for k, v in line.items() if k not in ("line", "number")}, **again})
    assert champion(name).version == one


@pytest.fixture
def backup(store):
    "Take a backup of MLflow's database now; what it gives restores it"

    def copy(source, target):
        with sqlite3.connect(source) as there, sqlite3.connect(target) as here:
            there.backup(here)

    database, kept = store.folder / "mlflow.db", store.folder / "backup.db"

    def take():
        copy(database, kept)
        return lambda: copy(kept, database)

    return take


def another_model() -> str:
    "Address of one more logged model"
    table = parcels(300)
    return log_model(fit("logistic_regression", table, "late", ["distance"], []), table[["distance"]])


def set_clock_ahead(store, name: str, version: int, seconds: int) -> None:
    "Let MLflow say that a version was registered so much later"
    with sqlite3.connect(store.folder / "mlflow.db") as database:
        change = "update model_versions set creation_time = creation_time + ? where name = ? and version = ?"
        database.execute(change, (seconds * 1000, name, version))


@pytest.mark.parametrize("then", ["refused", "held"])
def test_after_a_restore_a_version_does_not_inherit_the_number_of_a_champion(contest, uris, backup, then, caplog):
    "The champion was registered after the backup, and its number is given to a model that nobody has judged"
    name, (one, _, three) = contest
    promote(name, one, win(), rules)
    restore = backup()
    lost = register(another_model(), name)
    belong_to("manual__1")
    assert promote(name, lost, win(one), rules).event == "promoted"
    restore()
    assert champion(name).version == one
    assert f"version {lost} became champion" in missing_champion(name)
    assert [name in line for line in caplog.messages].count(True) == 1, "one warning"
    again = register(another_model(), name)
    assert again == lost and aliases(name) == {"champion": one, "challenger": again}
    assert opponent(name, uris[2]).version == one
    assert missing_champion(name), "the number is another model's"
    assert promote(name, again, loss(one), rules).event == "refused", "although its run has promoted that number"
    if then == "held":
        hold(name, "something looks wrong, keep what serves")
    assert (champion(name).version, missing_champion(name)) == (one, "")
    assert get_version(name, again).tags["promotion"] == "refused"
    with pytest.raises(RegistryError, match="has no predecessor"):
        rollback(name, "to the model that had this number")
    belong_to("")
    promote_by_hand(name, three, "the board decides")
    assert rollback(name, "too many complaints").version == one


def test_tags_of_a_lost_version_are_not_written_on_the_one_that_gets_its_number(contest, backup):
    name, (one, *_) = contest
    promote(name, one, win(), rules)
    restore = backup()
    promote(name, register(another_model(), name), win(one), rules)
    restore()
    assert "promotion" not in get_version(name, register(another_model(), name)).tags


def test_a_promotion_takes_effect_whatever_the_clock_of_mlflow_says(contest, store):
    name, (one, two, _) = contest
    promote(name, one, win(), rules)
    set_clock_ahead(store, name, two, 400)
    promote(name, two, win(one), rules)
    assert champion(name).version == two


def add_old_line(name: str, **fields) -> None:
    "Add a decision as a version of mlpkg did that kept neither the model's registration nor its versions' sources"
    columns = {column: kind for column, kind in record._columns.items() if column not in ("registered", "sources")}
    line = {**dict.fromkeys(columns, ""), "model": name, "event": "by hand", "details": "{}", **fields}
    Ledger(open_lake(), "registry/decisions", columns).settle(lambda lines: line)


def test_an_old_line_counts_for_a_version_that_is_older_than_the_first_line_that_names_it(contest, store):
    name, (one, two, _) = contest
    now = datetime.now(UTC).isoformat(timespec="seconds")
    add_old_line(name, at=now, version=one, champion=one, before=0)
    add_old_line(name, at=now, version=two, champion=two, before=one)
    assert champion(name).version == two
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(one))
    set_clock_ahead(store, name, two, 3600)  # the number belongs to a version that was registered an hour later
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat(timespec="seconds")
    add_old_line(name, at=later, event="held", version=0, champion=two, before=two)
    assert champion(name).version == one and hold_of(name)


def test_a_challenger_is_compared_with_the_version_that_serves_where_the_champion_of_the_record_is_gone(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    promote(name, two, win(one), rules)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(one))
    assert opponent(name, uris[2]).version == one
    with pytest.raises(RegistryError, match=f"compared with no champion, but version {one} is champion by now"):
        promote(name, three, win(), rules)
    ruling = promote(name, three, win(one), rules)
    assert (ruling.event, ruling.before, champion(name).version) == ("promoted", one, three)
    assert rollback(name, "it was better before").version == one


def test_a_hold_of_the_first_minutes_counts_where_clocks_differ(contest):
    name, (one, *_) = contest
    model = registered_model(mlflow.MlflowClient(), name)
    early = datetime.fromtimestamp(model.creation_timestamp // 1000 - 60, UTC).isoformat()
    add_old_line(name, at=early, event="held", version=0, champion=one, before=one, why="the audit")
    assert hold_of(name).why == "the audit"


def test_a_line_with_a_column_of_a_later_version_is_read(contest):
    name, (one, *_) = contest
    promote(name, one, win(), rules)
    line = {**decisions().read()[0][-1], "invented": "later"}
    assert record._rulings([line])[0].champion == one


def test_a_comparison_of_another_version_of_mlpkg_is_an_error_in_words():
    old = {"problem": "", "metrics": {"roc_auc": 0.7}, "gain": 0.1, "low": 0.05, "marks": ["a"]}
    with pytest.raises(ComparisonError, match="made by another version of mlpkg.* clear the evaluate step"):
        as_comparison(old)
    with pytest.raises(ComparisonError, match="another version of mlpkg"):
        as_comparison({"gains": {"roc_auc": 0.1}})


def test_uses_that_were_noted_by_blocks_alone_still_count(contest, uris):
    name, (one, two, _) = contest
    promote(name, one, win(), rules)
    days = pd.Series([f"day {n}" for n in range(31)])
    fair = FairRows(pd.DataFrame({"late": [0, 1] * 15 + [0]}), days, 1, 0, table="split/old parcels")
    marks = sorted(hashlib.sha256(day.encode()).hexdigest()[:12] for day in days)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for model in (name, "another model"):
        line = {"version": two, "champion": one, "before": one, "details": json.dumps({"marks": marks})}
        add_old_line(model, at=now, event="refused", **line)
    assert count_uses(name, uris[2], fair, "late") == 2, "of this model"
    found = compare(fair, "late", [0.2] * 31, [0.3] * 31, PromotionSettings(min_rows=1), champion=one, uses=1)
    decided = promote(name, two, found, rules)
    assert decided.details["uses"] == 2 and not set(decided.details["marks"]) & set(marks)


def test_a_deleted_champion_costs_each_reader_one_look(contest, monkeypatch):
    name, (one, two, _) = contest
    promote(name, one, win(), rules)
    promote(name, two, win(one), rules)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    follow(name)
    looks = []
    monkeypatch.setattr(record, "registered_model", lambda *args: looks.append(args) or registered_model(*args))
    assert follow(name).aliases == {"challenger": 3} and len(looks) == 1


def test_a_hold_and_manual_approval_keep_the_champion(contest):
    name, (one, two, three) = contest
    promote_by_hand(name, one, "approved", held=True)
    waiting = promote(name, three, win(one), rules)
    assert waiting.event == "waiting" and "`mlpkg promote 3` decides" in waiting.why
    assert aliases(name) == {"champion": one, "challenger": three}
    assert promote_by_hand(name, two, "people still may").version == two
    assert rollback(name, "so they may").version == one
    release(name, "the audit is over")
    assert promote(name, two, win(one), PromotionSettings(approval="manual")).event == "waiting"
    assert promote(name, three, win(one), rules).event == "promoted"


def test_a_rollback_that_is_refused_leaves_no_hold(contest, monkeypatch):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    promote(name, two, win(one), rules)
    loadable = oversight._loadable

    def meanwhile(*args):
        promote(name, three, win(two), rules)
        return loadable(*args)

    with monkeypatch.context() as patched:
        patched.setattr(oversight, "_loadable", meanwhile)
        with pytest.raises(RegistryError, match="version 3 of model .* is champion by now, not 2. Look again"):
            rollback(name, "too many complaints", held=True)
    assert hold_of(name) is None
    lines = len(decisions().read()[0])
    assert rollback(name, "too many complaints", held=True).version == two
    assert len(decisions().read()[0]) == lines + 1, "moved and held in one line"
    assert hold_of(name).why == "from version 3: too many complaints"
    assert (
        mlflow.MlflowClient()
        .get_registered_model(name)
        .tags["hold"]
        .startswith("from version 3: too many complaints (")
    )
    assert promote(name, three, win(two), rules).event == "waiting"
    release(name, "the complaints were about something else")
    assert promote_by_hand(name, one, "the old one again", held=True).version == one and hold_of(name)


def test_a_champion_that_became_challenger_once_more_is_mended_by_the_next_reader(contest):
    "Its register step and a twin that was taken for dead were one look apart"
    name, (one, *_) = contest
    promote(name, one, win(), rules)
    mlflow.MlflowClient().set_registered_model_alias(name, "challenger", str(one))
    assert champion(name).aliases == ("champion",) and aliases(name) == {"champion": one}


def test_an_older_version_that_is_registered_again_does_not_take_the_alias_from_a_newer_one(contest, uris):
    name, (one, _, three) = contest
    assert register(uris[0], name) == one and aliases(name) == {"challenger": three}


def test_an_alarm_about_the_champion_is_a_use_also_where_others_have_decided_since(contest):
    name, (one, two, three) = contest
    promote(name, one, win(), rules)
    promote(name, two, replace(loss(one), marks=["a day"], block_marks=["a day"]), rules)
    found = replace(
        loss(one), marks=["a day"], block_marks=["a day"], uses=2, alarms=1
    )  # Evaluated before two was judged
    assert promote(name, three, found, rules).details["uses"] == 3


def test_a_user_id_without_a_name_can_promote(contest, monkeypatch):
    def nobody():
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nobody)
    name, (one, *_) = contest
    assert f"(user {os.getuid()})" in promote_by_hand(name, one, "approved").tags["promotion.reasons"]


def test_near_equal_models_are_not_promoted_and_reuse_makes_it_harder(contest):
    name, (one, *_) = contest
    rng = np.random.default_rng(1)
    days = np.repeat([f"day {n}" for n in range(31)], 200)
    x = rng.normal(size=len(days))
    y = (rng.uniform(size=len(days)) < 1 / (1 + np.exp(1.5 - x))).astype(int)
    theirs, ours = (1 / (1 + np.exp(-x - rng.normal(0, noise, len(x)))) for noise in (0.40, 0.35))
    fair = FairRows(pd.DataFrame({"late": y}), pd.Series(days), 1, 0)
    found = compare(fair, "late", ours, theirs, rules, champion=one)
    assert found.gains["roc_auc"].value > 0.001, "by the point estimate it would win"
    assert decide(found, rules).promote is False
    lows = [replace(found, uses=uses).table(rules).loc["roc_auc", "at least"] for uses in (1, 2, 10)]
    assert lows[0] > lows[1] > lows[2]


def test_two_trainings_that_were_evaluated_side_by_side_count_both_uses(contest, uris):
    name, (one, two, three) = contest
    days = pd.Series([f"day {n}" for n in range(31)])
    fair = FairRows(pd.DataFrame({"late": [0] * 31}), days, 1, 0, table="split/parcels")
    marks = block_marks(days, "split/parcels late")
    promote(name, one, win(), rules)
    first, second = (replace(loss(one), marks=marks, uses=count_uses(name, uri, fair, "late")) for uri in uris[1:])
    assert (first.uses, second.uses) == (1, 1), "neither knew of the other"
    assert [
        promote(name, version, found, rules).details["uses"] for version, found in ((two, first), (three, second))
    ] == [1, 2]
    assert count_uses("a new name", uris[0], fair, "late") == 3, "whatever the name of the model"
    assert count_uses(name, uris[0], fair, "lost") == 1, "another question"


@pytest.mark.parametrize(
    "sizes", [[100] * 6, [10, 50, 100, 200, 400], [290] + [10] * 29], ids=["equal", "five", "one large"]
)
def test_bounds_keep_their_level_whatever_the_sizes_of_the_blocks(sizes):
    "Two models that are equally good over all days, and whose days differ; 400 worlds, one-sided bounds of 95 %"
    rng, count, false, above, aucs = np.random.default_rng(7), len(sizes), 0, [], []
    for _ in range(400):
        day = np.repeat(np.arange(count), sizes)
        x = rng.normal(size=(2, len(day))) * (1 + rng.normal(0, 0.5, (2, count))[:, day])
        y = (
            rng.uniform(size=len(day)) < 1 / (1 + np.exp(1.2 - rng.normal(0, 0.7, count)[day] - 0.6 * x.sum(0)))
        ).astype(int)
        ours, theirs = (1 / (1 + np.exp(-one)) for one in x)
        false += gain("roc_auc", y, ours, theirs, day).bounds(0.95)[0] > 0
        one = measure("roc_auc", y, ours, day)
        above.append(one.bounds(0.95)[0])
        aucs.append(one.value)
    allowed = 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert false / 400 <= allowed and np.mean(np.array(above) > np.mean(aucs)) <= allowed


def test_a_class_of_which_few_rows_judge_promotes_nobody():
    rules = PromotionSettings(min_rows=30)

    def judged(rows: int, rare: int, seed: int = 0, days: int = 0) -> Comparison:
        rng, y = np.random.default_rng(seed), np.arange(rows) < rare
        place = np.arange(rows) // max(rows // days, 1) if days else np.arange(rows)
        fair = FairRows(pd.DataFrame({"late": y}), pd.Series(place).astype("str"), 1, 0)
        return compare(fair, "late", rng.uniform(size=rows), None, rules)

    assert not [seed for seed in range(40) if decide(judged(34, 2, seed), rules).promote], "the scores are random"
    words = judged(34, 2).problem
    assert "2 of 34 rows have 1, the rarer class, in 2 blocks; at least 10 rows of it in 5 blocks are needed" in words
    assert "Decide by hand" in words
    assert "0 of 34 rows have 1" in judged(34, 0).problem and "1 of 34 rows have 0" in judged(34, 33).problem
    assert not judged(61, 10).problem and not judged(61, 51).problem
    assert "12 of 60 rows have 1, the rarer class, in 1 block;" in judged(60, 12, days=5).problem


def contest_of(kind: str, ours: float, theirs: float) -> tuple[Comparison, PromotionSettings]:
    "Two models of a task on 2,000 rows in 40 blocks; strength 0 knows nothing, below 0 it is worse than chance"
    rng, rules = np.random.default_rng(3), PromotionSettings(tolerance={})
    truth, noise = rng.normal(size=2000), rng.normal(size=(2, 2000))
    if kind == "regression":
        said: list = [np.where(one > 0, one * truth, -4 * one) for one in (ours, theirs)]  # all too high
        y, task = truth, Task("regression")
    elif kind == "binary":
        y, task = (truth > 0).astype(int), yes_no
        said = [1 / (1 + np.exp(-(one * truth + extra))) for one, extra in zip((ours, theirs), noise, strict=True)]
    else:
        codes = np.digitize(truth, [-0.5, 0.5])
        y, task = np.array(["a", "b", "c"])[codes], Task("multiclass", ("a", "b", "c"))
        odds = [3 * one * np.eye(3)[codes] + rng.normal(0, 0.3, (2000, 3)) for one in (ours, theirs)]
        shares = [np.exp(one) for one in odds]
        said = [one / one.sum(1, keepdims=True) for one in shares]
    fair = FairRows(pd.DataFrame({"y": y}), pd.Series(np.arange(2000) // 50).astype("str"), 1, 0)
    return compare(fair, "y", *said, rules, champion=1, task=task), rules


@pytest.mark.parametrize(("kind", "metric"), [("binary", "roc_auc"), ("multiclass", "log_loss"), ("regression", "r2")])
def test_a_challenger_that_is_no_better_than_chance_replaces_a_worse_champion_with_a_warning(kind, metric):
    decision = decide(*contest_of(kind, -0.3, -0.6))
    assert decision.promote, "after a change, to keep the worse one is not better"
    (warning, *_) = decision.reasons
    assert warning.startswith(f"WARNING: the champion is worse still, so it is replaced, but {metric} ")
    assert (
        "is no better than the best constant: a gain of -" in warning and f"`promotion.minimum = {metric}: " in warning
    )
    assert "where it was chosen" in warning, "it says what to look at"


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_challenger_that_is_better_than_chance_is_promoted_without_a_warning(kind):
    decision = decide(*contest_of(kind, 0.8, -0.6))
    assert decision.promote and "WARNING" not in "; ".join(decision.reasons)


def test_a_challenger_that_is_no_better_than_chance_does_not_win_by_another_metric():
    rng = np.random.default_rng(3)
    y, blocks = rng.integers(0, 2, 2000), pd.Series(np.arange(2000) // 50).astype("str")
    fair, said = FairRows(pd.DataFrame({"y": y}), blocks, 1, 0), rng.uniform(size=2000)
    rules = PromotionSettings(margin={"roc_auc": 0.001, "brier": 0.001}, tolerance={})
    found = compare(fair, "y", 0.5 + said / 100, said, rules, champion=1)
    assert found.gains["brier"].bounds(0.99)[0] > 0.001, "it is better by the Brier score"
    decision = decide(found, rules)
    assert not decision.promote
    assert "no better than the best constant" in decision.reasons[0] and "although brier" in decision.reasons[-1]


def test_what_a_training_cannot_beat_is_in_the_record(contest):
    name, (one, two, _) = contest
    promote(name, one, win(), rules)
    found, own = contest_of("binary", -0.3, -0.6)
    ruling = promote(name, two, replace(found, champion=one), own)
    assert ruling.event == "promoted" and ruling.why.startswith("WARNING: the champion ")
    assert get_version(name, two).tags["promotion.reasons"].startswith("WARNING: the champion ")


def returning(lake: Lake, split: SplitRule, customers: int, rows: int) -> FairRows:
    "Rows of thirty days that judge, of customers who come back, as a recipe declares them"
    recipe = Recipe("orders", "late", Task("binary", (0, 1)), ("x",), (), dict, split, time="at", group="customer")
    rng, count = np.random.default_rng(0), 2 * rows
    day = np.sort(np.arange(count) % 60)
    table = pd.DataFrame({"on_day": [f"day {one:02}" for one in day], "customer": rng.integers(0, customers, count)})
    table = table.assign(row_id=[f"row {one}" for one in range(count)], x=rng.normal(size=count), late=day % 2)
    lake.write("split/orders", split.divide(table), mode="overwrite")
    learner = Learner("challenger", ["x"], {"split/orders": lake.version("split/orders")})
    return fair_rows(lake, recipe.holdout, [learner], PromotionSettings())


def equal_models(fair: FairRows, seed: int, own_customers: float, own_days: float, better: float = 0.0):
    "The rows with truth, and two models of which each has its good and bad customers and days; one may know more"
    rng, x = np.random.default_rng([9, seed]), fair.rows["x"].to_numpy()
    day, customer = (pd.factorize(fair.rows[name])[0] for name in ("on_day", "customer"))
    y = rng.uniform(size=len(x)) < 1 / (1 + np.exp(1 - x))
    off = rng.normal(0, 0.5, (2, len(x)))
    off += own_customers * rng.normal(0, 1, (2, customer.max() + 1))[:, customer]
    off += own_days * rng.normal(0, 1, (2, day.max() + 1))[:, day] * x
    ours, theirs = 1 / (1 + np.exp(1 - x - off * [[1 - better], [1]]))
    return replace(fair, rows=fair.rows.assign(late=y.astype(int))), ours, theirs


@pytest.mark.parametrize(
    ("by", "own_customers", "own_days"),
    [("time", 1.0, 0.0), ("row", 1.0, 1.0), ("group", 0.0, 1.0)],
)
def test_equal_models_are_promoted_as_rarely_as_claimed_where_customers_return(tmp_path, by, own_customers, own_days):
    "The first use of a holdout promises 2.5 %: of 60 worlds 6 or fewer, which chance exceeds once in 1,000 times"
    columns = {"time": ("on_day",), "row": ("row_id",), "group": ("customer",)}[by]
    split = SplitRule(by, columns, validation=0.25, holdout=0.5)
    fair = returning(Lake(str(tmp_path)), split, 80 if by == "group" else 40, 2400)
    rules = PromotionSettings(metric="brier", margin={"brier": 0.0}, tolerance={})

    def promoted(seed: int, better: float = 0.0) -> bool:
        given, ours, theirs = equal_models(fair, seed, own_customers, own_days, better)
        return decide(compare(given, "late", ours, theirs, rules, champion=1), rules).promote

    assert not fair.problem
    assert sum(promoted(seed) for seed in range(60)) <= 6
    assert sum(promoted(seed, better=0.8) for seed in range(10)) >= 8, "a model that is better wins"


def few_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    "Labels of ninety rows, and probabilities that tell them apart well"
    rng = np.random.default_rng(seed)
    y = (np.arange(90) % 2).astype(int)
    return y, 1 / (1 + np.exp(-2.2 * rng.normal(y * 2.0 - 1, 0.9)))


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_a_gain_over_chance_is_that_of_the_interval_shown_beside_it(seed):
    y, p = few_rows(seed)
    shown = evaluate(y, p).metrics
    over = gain("roc_auc", y, p, yes_no.guess(y, "roc_auc"))
    assert over.value == pytest.approx(shown["roc_auc"] - 0.5)
    np.testing.assert_allclose(over.bounds(0.975), (shown["roc_auc_low"] - 0.5, shown["roc_auc_high"] - 0.5))
    needed = over.critical_value(0.95, 0.4)
    assert replace(over, value=needed).bounds(0.95)[0] == pytest.approx(0.4)
    assert 0.4 < needed < over.detectable(0.95, 0.4) < 0.5  # more than 0.5 no model can gain
