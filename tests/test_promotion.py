"""Promotion across processes, machines and crashes, and comparisons inside the noise: what a page cannot show.

Races need several processes that start together, a crash needs a process that dies. The tests of the ledger on S3 run
where AWS_ENDPOINT_URL (and credentials) point to a server; they make a bucket of their own.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime, timedelta

import mlflow
import numpy as np
import pandas as pd
import pytest

from mlpkg.data.lake import Lake, open_lake
from mlpkg.data.ledger import Ledger
from mlpkg.models import record
from mlpkg.models.holdout import FairRows
from mlpkg.models.oversight import history, promote_by_hand, release, rollback
from mlpkg.models.promotion import Decision, compare, decide, opponent, promote
from mlpkg.models.record import decisions, follow, registered_model
from mlpkg.models.registry import RegistryError, champion, get_version, register, versions
from mlpkg.models.storage import log_model
from mlpkg.models.training import fit
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
from mlpkg.models.promotion import Decision, promote
from mlpkg.models.registry import RegistryError
from mlpkg.steps.tracking import connect
name, version, against = sys.argv[1:]
connect()
print("ready", flush=True)
sys.stdin.readline()
try:
    promote(name, int(version), Decision(True, ["stronger"]), int(against) or None)
    print("won")
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


WIN = Decision(True, ["stronger"])


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
    promote(name, one, WIN, None)
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
        promote(name, three, WIN, None)


def test_a_reader_finds_a_champion_at_any_moment(contest):
    name, numbers = contest
    promote(name, numbers[0], WIN, None)
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
            promote(name, after, WIN, before)
    done.set()
    reader.join()
    assert failures == [] and seen == set(numbers)


@pytest.mark.parametrize("dies_at", ["the alias", "the tags"])
def test_a_crash_after_the_decision_is_mended_by_the_next_reader(contest, dies_at, monkeypatch):
    name, (one, two, _) = contest
    promote(name, one, WIN, None)
    broken = "set_registered_model_alias" if dies_at == "the alias" else "set_model_version_tag"

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, broken, die)
        with pytest.raises(KeyboardInterrupt):
            promote(name, two, WIN, one)
    assert aliases(name)["champion"] == (one if dies_at == "the alias" else two)
    assert champion(name).version == aliases(name)["champion"] == two
    assert get_version(name, one).tags["replaced.by"] == str(two)
    assert rollback(name, "it was better before").version == one


def test_a_cleared_register_gives_the_same_decision_and_no_second_alias(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, WIN, None)
    belong_to("manual__1")
    assert opponent(name, uris[2]).version == one
    first = promote(name, three, WIN, one)
    assert first.event == "promoted" and aliases(name) == {"champion": three}
    assert opponent(name, uris[2]).version == one, "never itself"
    assert register(uris[2], name) == three and aliases(name) == {"champion": three}
    again = promote(name, three, Decision(False, ["0.7 against 0.7"]), three)
    assert (again.event, again.number) == ("promoted", first.number)
    promote_by_hand(name, two, "the board decides")
    assert promote(name, three, WIN, one).event == "promoted" and champion(name).version == two, "not again"
    belong_to("manual__2")
    assert opponent(name, uris[2]).version == two


def test_what_promotion_writes(contest):
    name, (one, two, three) = contest
    assert [v.aliases for v in versions(name)] == [("challenger",), (), ()]
    promote(name, three, WIN, None)
    assert get_version(name, three).aliases == ("champion",)
    assert promote(name, two, Decision(False, ["too weak"]), three).event == "refused"
    assert champion(name).version == three
    assert get_version(name, two).tags["promotion.against"] == str(three)
    assert get_version(name, three).tags["challenged.by"] == str(two)
    promote(name, one, WIN, three)
    assert get_version(name, three).tags["replaced.why"] == "stronger"
    assert history(name)["promotion"].tolist() == ["promoted", "refused", "promoted"]


def test_a_champion_from_before_the_record_is_taken_over(contest):
    name, (one, two, three) = contest
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(one))
    assert champion(name).version == one
    with pytest.raises(RegistryError, match=f"but version {one} is champion by now"):
        promote(name, three, WIN, None)
    promote(name, two, WIN, one)
    assert rollback(name, "as it was").version == one


def test_a_champion_that_was_deleted_in_mlflow_counts_as_none(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, WIN, None)
    promote(name, two, WIN, one)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    assert opponent(name, uris[2]) is None
    with pytest.raises(RegistryError, match=f"but version {two} is champion by now"):
        promote(name, three, WIN, one)
    assert promote(name, three, WIN, None).event == "promoted"
    assert champion(name).version == three
    assert rollback(name, "too many complaints").version == one, "past the one that is gone"
    with pytest.raises(RegistryError, match="has no predecessor"):
        rollback(name, "even more complaints")


def test_a_rollback_from_a_champion_that_was_deleted_in_mlflow(contest):
    name, (one, two, _) = contest
    promote(name, one, WIN, None)
    promote(name, two, WIN, one)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    assert rollback(name, "it is gone").version == one
    assert champion(name).version == one


def test_a_model_that_is_registered_anew_has_no_past(contest, uris):
    name, (one, two, three) = contest
    promote(name, one, WIN, None)
    promote_by_hand(name, two, "the board decides", held=True)
    mlflow.MlflowClient().delete_registered_model(name)
    assert [register(uri, name) for uri in uris] == [one, two, three]
    assert aliases(name) == {"challenger": three}, "no version serves, and none has served"
    assert champion(name) is None
    assert promote(name, three, WIN, None).event == "promoted", "nobody holds the champion"
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
    promote(name, two, WIN, one)
    assert rollback(name, "it was better before").version == one


def test_a_lake_that_was_made_anew_begins_a_new_record(contest):
    name, (one, two, three) = contest
    promote(name, one, WIN, None)
    promote(name, two, WIN, one)
    shutil.rmtree(f"{open_lake().root}/registry")
    promote(name, three, WIN, two)
    assert champion(name).version == three
    assert get_version(name, two).tags["replaced.by"] == str(three)
    assert rollback(name, "it was better before").version == two


def test_a_version_that_was_registered_after_the_decision_does_not_become_champion_by_it(contest, uris):
    "MLflow's database was restored from a backup that does not have the champion, whose number is given again"
    name, (one, two, three) = contest
    promote(name, one, WIN, None)
    (line,) = (line for line in decisions().read()[0] if line["model"] == name)
    past = datetime.fromisoformat(line["at"]) - timedelta(days=1)
    again = {"at": past.isoformat(), "version": three, "champion": three, "before": one}
    decisions().settle(lambda lines: {**{k: v for k, v in line.items() if k not in ("line", "number")}, **again})
    assert champion(name).version == one


def test_a_deleted_champion_costs_each_reader_one_look(contest, monkeypatch):
    name, (one, two, _) = contest
    promote(name, one, WIN, None)
    promote(name, two, WIN, one)
    mlflow.MlflowClient().delete_model_version(name, str(two))
    follow(name)
    looks = []
    monkeypatch.setattr(record, "registered_model", lambda *args: looks.append(args) or registered_model(*args))
    assert follow(name).aliases == {"challenger": 3} and len(looks) == 1


def test_a_hold_and_manual_approval_keep_the_champion(contest):
    name, (one, two, three) = contest
    promote_by_hand(name, one, "approved", held=True)
    waiting = promote(name, three, WIN, one)
    assert waiting.event == "waiting" and "`mlpkg promote 3` decides" in waiting.why
    assert aliases(name) == {"champion": one, "challenger": three}
    assert promote_by_hand(name, two, "people still may").version == two
    assert rollback(name, "so they may").version == one
    release(name, "the audit is over")
    assert promote(name, two, WIN, one, approval="manual").event == "waiting"
    assert promote(name, three, WIN, one).event == "promoted"


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
    rules = PromotionSettings(margin=0.001)
    found = compare(fair, "late", ours, theirs, rules, champion=one)
    assert found.gain > 0.001, "by the point estimate it would win"
    assert decide(found, rules).promote is False
    lows = [compare(fair, "late", ours, theirs, rules, uses, one).low for uses in (1, 2, 10)]
    assert lows[0] > lows[1] > lows[2]
