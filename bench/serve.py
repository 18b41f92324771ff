"""How fast does the API answer, compared with `mlflow models serve` on the same model and the same records?"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from measure import (
    BENCH,
    CommandError,
    figures_table,
    finish,
    machine,
    memory_mb,
    new_console,
    print_load,
    run,
    scratch,
    started,
)
from rich.table import Table

PACKAGES = ("fastapi", "uvicorn", "mlflow", "scikit-learn", "pandas")
MODEL = "flights"
TIMES, LATENCY = 5.0, 10.0  # Targets: multiple of the requests of mlflow at every load; p50 in ms at 8 connections
START = 90  # Seconds that a server may take to start


@dataclass(frozen=True)
class Server:
    "A way to serve a model"

    name: str
    command: list[str]
    port: int
    health: str
    path: str
    bodies: list[str]  # The same records, in the form that this server takes


def free_port() -> int:
    "A port that nobody listens on"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def prepare(project: Path, months: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    "A project with a champion; the environment of its servers, and records that the model has not seen"
    import mlflow
    from project import clean_env

    from mlpkg.data.inputs import inputs_from
    from mlpkg.data.lake import open_lake
    from mlpkg.examples.flights import categorical, features_contract, numeric, seed_lake
    from mlpkg.models.oversight import promote_by_hand
    from mlpkg.models.registry import register
    from mlpkg.models.storage import log_model
    from mlpkg.models.training import fit
    from mlpkg.settings import load_settings
    from mlpkg.steps.tracking import connect
    from mlpkg.testing import settings_text

    project.mkdir()
    (project / "settings.ini").write_text(settings_text({"serving.model": MODEL}))
    os.environ |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    for name in [name for name in os.environ if name.startswith("MLPKG_") or name == "MLFLOW_TRACKING_URI"]:
        del os.environ[name]
    settings = connect(load_settings(file=project / "settings.ini", env={}))
    parts = seed_lake(open_lake(settings), months, rows=sys.maxsize).read("split/flights")
    train, rest = parts[parts.part != "holdout"], parts[parts.part == "holdout"]
    model, columns = fit("hist_gradient_boosting", train, "late", numeric, categorical), [*numeric, *categorical]
    uri = log_model(model, train[columns], inputs=inputs_from(features_contract(), train, columns))
    register(uri, MODEL)
    promote_by_hand(MODEL, 1, "the bench")
    mlflow.end_run()
    some = rest[columns].sample(1000, random_state=0).astype(object)
    env = clean_env(project) | {"MLFLOW_TRACKING_URI": settings.tracking.uri}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # mlflow starts `uvicorn`
    return env, some.where(some.notna(), None).to_dict("records")


def servers(records: list[dict[str, Any]]) -> list[Server]:
    "The servers to compare, each given one record at a time"
    python, ours, theirs = sys.executable, free_port(), free_port()
    start = f"from mlpkg.serving.app import serve; serve(port={ours})"
    flow = [python, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{MODEL}@champion"]
    flow += ["--port", str(theirs), "--host", "127.0.0.1", "--env-manager", "local"]
    split = [{"columns": list(one), "data": [list(one.values())]} for one in records]
    return [
        Server("mlpkg", [python, "-c", start], ours, "/readyz", "/v1/predict",
               [json.dumps({"records": [one]}) for one in records]),
        Server("mlflow", flow, theirs, "/ping", "/invocations",
               [json.dumps({"dataframe_split": one}) for one in split]),
    ]  # fmt: skip


def wait(server: Server, process: subprocess.Popen, log: Path) -> float:
    "Wait until a server answers and return the seconds it took; CommandError if it does not"
    begin = time.perf_counter()
    while time.perf_counter() - begin < START and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{server.health}", timeout=5):
                return time.perf_counter() - begin
        except OSError:
            time.sleep(0.1)
    raise CommandError(f"{server.name} does not answer\n{log.read_text()[-3000:]}")


def probability(server: Server, body: str) -> float:
    "What a server says about a record"
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{server.port}{server.path}", body.encode(), headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        predictions = json.load(answer)["predictions"]
    return predictions[0]["probability"] if isinstance(predictions[0], dict) else predictions[0][1]


def load(server: Server, process: subprocess.Popen, connections: int, seconds: float) -> dict[str, float]:
    "Put load on a server and return what was measured"
    job = {"port": server.port, "path": server.path, "bodies": server.bodies}
    job |= {"connections": connections, "seconds": seconds}
    before = cpu(process.pid)
    done = subprocess.run(
        [sys.executable, str(BENCH / "load.py")], input=json.dumps(job), capture_output=True, text=True
    )
    if done.returncode:
        raise CommandError(f"{server.name} under load of {connections} connections:\n{done.stderr[-3000:]}")
    used = (cpu(process.pid) - before) / (seconds + 1)
    return {**json.loads(done.stdout), "cores": used, "memory_mb": memory_mb(process.pid)}


def cpu(pid: int) -> float:
    "Processor time of a process and its children, seconds"
    root = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in [root, *root.children(recursive=True)])


def comparison(results: dict[int, dict[str, dict[str, float]]]) -> Table:
    "The figures side by side"
    headings = ("connections", "server", "req/s", "times", "p50 ms", "p99 ms", "worst", "cores", "MB")
    table = figures_table(*headings, names="server")
    for connections, both in results.items():
        base = both["mlflow"]["per_second"]
        for name, found in both.items():
            row = [str(connections), name, f"{found['per_second']:,.0f}", f"{found['per_second'] / base:.1f}"]
            row += [f"{found[key]:.1f}" for key in ("p50", "p99", "worst")]
            table.add_row(*row, f"{found['cores']:.2f}", f"{found['memory_mb']:,.0f}")
    return table


def verdicts(results: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    "Which targets were missed, in words"
    found = []
    for connections, both in results.items():
        ours, theirs = (both[name] for name in ("mlpkg", "mlflow"))
        times = ours["per_second"] / theirs["per_second"]
        if times < TIMES:
            found.append(
                f"{connections} connections: {times:.1f} times the requests of mlflow, the target is {TIMES:g}"
            )
        if connections == 8 and ours["p50"] >= LATENCY:
            found.append(f"{connections} connections: p50 {ours['p50']:.1f} ms, the target is under {LATENCY:g}")
    return found


def targets(results: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    "Each target and whether it was reached"
    times = min(both["mlpkg"]["per_second"] / both["mlflow"]["per_second"] for both in results.values())
    word = "reached" if times >= TIMES else "MISSED"
    found = [f"Target of at least {TIMES:g} times the requests of mlflow: {word}, {times:.1f} times or more"]
    if 8 in results:
        p50 = results[8]["mlpkg"]["p50"]
        word = "reached" if p50 < LATENCY else "MISSED"
        found.append(f"Target of p50 under {LATENCY:g} ms at 8 connections: {word}, {p50:.1f} ms")
    return found


def main(
    months: Annotated[str, typer.Option(help="Months of flights to train on")] = "2013-01..2013-04",
    connections: Annotated[list[int], typer.Option(help="Connections; repeat the option for each case")] = [1, 8, 64],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Seconds of load in each case", min=1)] = 10,
):
    """Ask `mlpkg serve` and `mlflow models serve` for one record at a time; compare latency and requests per second.

    Both are one process with one model, started at the same time and loaded in turn; each answer of `mlpkg serve` is
    also checked and kept in the lake, as in production. The exit code is 1 if a target is missed.
    """
    console = new_console()
    results: dict[int, dict[str, dict[str, float]]] = {}
    load_average = [os.getloadavg()]
    with scratch() as folder, console.status("Training a model") as status, ExitStack() as stack:
        env, records = prepare(folder / "project", months)
        ways = servers(records)
        status.update("Starting the servers")
        logs = {way.name: folder / f"{way.port}.log" for way in ways}
        running = {w.name: stack.enter_context(started(w.command, folder, env, logs[w.name])) for w in ways}
        starts = {way.name: wait(way, running[way.name], logs[way.name]) for way in ways}
        said = [[probability(way, way.bodies[place]) for place in range(20)] for way in ways]
        for many in connections:
            results[many] = {}
            for way in ways:
                status.update(f"{many} connections: {way.name}")
                results[many][way.name] = load(way, running[way.name], many, seconds)
                load_average.append(os.getloadavg())
    faults, same = verdicts(results), said[0] == said[1]
    if not same:
        faults.append("the servers give different probabilities for the same records")
    console.print(comparison(results))
    console.print("one record per request; times: req/s relative to `mlflow models serve`; cores, MB: of the server")
    console.print(f"\nSame probabilities from both for {len(said[0])} records: {'yes' if same else 'NO'}")
    for line in targets(results):
        console.print(line)
    print_load(console, load_average, "at the start, after each case (the load generator included)")
    record = {
        "options": {"months": months, "connections": connections, "seconds": seconds}, "machine": machine(*PACKAGES),
        "load_average": load_average, "start_seconds": starts, "results": results,
    }  # fmt: skip
    finish(console, "serve", record, faults)


if __name__ == "__main__":
    run(main)
