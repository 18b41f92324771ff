"""What `bench/batch.py` measures, each job in a separate process: the job and its result are JSON objects."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from mlpkg.batch.predict import rebatch, score
from mlpkg.batch.screening import screen
from mlpkg.data.inputs import as_contract, shape
from mlpkg.data.lake import Lake, open_lake
from mlpkg.data.sources import open_source
from mlpkg.models.registry import load_model
from mlpkg.models.scoring import Scorer, native_threads
from mlpkg.steps.tracking import connect

QUIET = 0.15  # Cores that others may take during a turn
KEEP, BY = ["day", "carrier", "flight", "origin", "dest"], ["origin", "sched_hour"]


def months(lake: Lake) -> list[str]:
    "The months of the flights"
    return sorted(set(lake.read("clean/flights", columns=["month"])["month"]))


def prepare(lake: Lake, wanted: str, times: int) -> dict[str, Any]:
    "Flights, the same flights several times over, and a champion that was fitted as the training step does it"
    import mlflow

    from mlpkg.data.inputs import inputs_from
    from mlpkg.examples.flights import categorical, features_contract, numeric, seed_lake
    from mlpkg.models.oversight import promote_by_hand
    from mlpkg.models.registry import register
    from mlpkg.models.storage import log_model
    from mlpkg.models.training import fit

    seed_lake(lake, wanted, rows=sys.maxsize)
    known = lake.read("split/flights", filters=[("part", "!=", "holdout")])
    columns = [*numeric, *categorical]
    pipeline = fit("hist_gradient_boosting", known, "late", numeric, categorical)
    uri = log_model(pipeline, known[columns], inputs=inputs_from(features_contract(), known, columns))
    promote_by_hand("flights", register(uri, "flights"), "the only one there is")
    mlflow.end_run()
    for month in months(lake):
        rows = lake.table("clean/flights", filters=[("month", "=", month)])
        lake.write("large/flights", (rows for _ in range(times)), mode="replace", partition={"month": month})
    return {"rows": lake.count("clean/flights"), "large": lake.count("large/flights")}


def seconds(function: Callable[[], Any]) -> float:
    "Wall time of a call"
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def turn(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    "Wall time of each way, and `others`: the most cores that everything else on the machine took meanwhile"
    taken, others = {}, 0.0
    for name, way in ways.items():
        busy, own = psutil.cpu_times(), time.process_time()
        taken[name] = seconds(way)
        now = psutil.cpu_times()
        used = sum(now) - sum(busy) - (now.idle - busy.idle) - (now.iowait - busy.iowait)
        others = max(others, (used - (time.process_time() - own)) / taken[name])
    return taken | {"others": others}


def turns(ways: dict[str, Callable[[], Any]], repeat: int) -> list[dict[str, float]]:
    "The `repeat` least disturbed turns, out of at most three times as many"
    taken: list[dict[str, float]] = []
    while sum(one["others"] < QUIET for one in taken) < repeat and len(taken) < 3 * repeat:
        taken.append(turn(ways))
    return sorted(taken, key=lambda one: one["others"])[:repeat]


def speed(lake: Lake, table: str, repeat: int) -> dict[str, Any]:
    "Time batch prediction and the model on rows in memory in turn, then each part of batch prediction alone"
    loaded, every = load_model("flights"), {"month": months(lake)}
    frame = shape(lake.read(table, columns=list(loaded.columns)), loaded.inputs)

    def batch() -> None:
        score(lake, loaded, table, "predictions/flights", every, KEEP, BY)

    ways = {"model": lambda: loaded.pipeline.predict_proba(frame), "batch": batch}
    for way in ways.values():
        way()
    taken = turns(ways, repeat)
    expected = np.sort(loaded.pipeline.predict_proba(frame)[:, 1])
    found = np.sort(lake.read("predictions/flights", columns=["probability"])["probability"])
    same = bool((expected == found).all())
    return {"rows": len(frame), "taken": taken, "same": same, "parts": parts(lake, table, loaded, every)}


def parts(lake: Lake, table: str, loaded: Any, every: dict[str, Any]) -> dict[str, float]:
    "What each part takes alone, on one core"
    contract, inputs = as_contract(loaded.inputs), [one.name for one in loaded.inputs]
    columns = list(dict.fromkeys(["month", *KEEP, *BY, *inputs]))
    source, where = open_source(lake, table), [("month", "in", every["month"])]
    pieces: list[pa.RecordBatch] = list(rebatch(source.read(columns, where), 49_152))
    screened = [screen(piece, loaded.inputs, contract).table for piece in pieces]
    written = lake.table("predictions/flights")
    with native_threads():
        scorer = Scorer(loaded.pipeline, loaded.inputs)
        ready = [scorer.encode(table) for table in screened]
        work = {
            "read": lambda: list(source.read(columns, where)),
            "screen": lambda: [screen(piece, loaded.inputs, contract) for piece in pieces],
            "encode": lambda: [scorer.encode(table) for table in screened],
            "model": lambda: [scorer.predict(one) for one in ready],
            "write": lambda: lake.write("predictions/flights", written, mode="replace", partition=every),
        }
        return {name: statistics.median(seconds(one) for _ in range(3)) for name, one in work.items()}


def memory(lake: Lake, table: str) -> dict[str, Any]:
    "Peak memory while a table is scored, and how long it took"
    done = score(lake, load_model("flights"), table, f"predictions/{table}", {"month": months(lake)}, KEEP, BY)
    return {
        "rows": done.rows,
        "seconds": done.seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    connect()
    print(json.dumps({"prepare": prepare, "speed": speed, "memory": memory}[job.pop("do")](open_lake(), **job)))
