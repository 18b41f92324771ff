#!/usr/bin/env bash
# Brings up a real stack, beside one that may be running: with its own project name, secrets, ports and volumes.
# Runs DAGs through Airflow's REST API, one after the other and the same one twice if it is given twice, checks over
# HTTP what MLflow recorded and what the API answers, and takes everything down again.
#
#   docker/smoke.sh DAG              with its defaults
#   docker/smoke.sh [DAG CONF]...    docker/smoke.sh flights_etl '{"months": "2013-01"}'
#   KEEP=1 docker/smoke.sh           leave it running, to look at it
set -euo pipefail
cd "$(dirname "$0")/.."

(($# != 1)) || set -- "$1" '{}'
(($#)) || set -- flights_etl '{"months": "2013-01..2013-03"}' flights_train '{"budget": 1}'
if (($# % 2)); then
  echo "smoke: '${!#}' has no CONF; give pairs, like flights_etl '{\"months\": \"2013-01\"}' flights_train '{}'" >&2
  exit 2
fi
secrets=$(mktemp -d)
trap 'rm -r "$secrets"' EXIT
export AIRFLOW_PORT=${AIRFLOW_PORT:-18080} MLFLOW_PORT=${MLFLOW_PORT:-15000} API_PORT=${API_PORT:-18001}
GIT_COMMIT=$(git rev-parse HEAD 2>/dev/null) || GIT_COMMIT=unknown
export GIT_COMMIT
compose() { docker compose --project-name mlpkg-smoke --env-file "$secrets/.env" "$@"; }

end() {
  status=$?
  if ((status)); then compose logs --no-color --tail 40; echo "smoke: failed, see the logs above"; fi
  if [[ ${KEEP:-} ]]; then
    echo "left running; its secrets are in $secrets/.env. To end it:"
    echo "docker compose --project-name mlpkg-smoke --env-file $secrets/.env down --volumes && rm -r $secrets"
  else
    compose down --volumes && rm -r "$secrets"
  fi
  exit "$status"
}

python3 docker/env.py "$secrets/.env"
found=$(compose ps --all --quiet)
if [[ $found ]]; then
  echo "smoke: the stack of an earlier run is there, which may have been killed. To end it, with all that is in it:" >&2
  echo "docker ps --all --quiet --filter label=com.docker.compose.project=mlpkg-smoke | xargs docker rm --force" >&2
  exit 2
fi
compose down --volumes # what a run that was killed has left, with passwords of its own
trap end EXIT
compose up --detach --build --wait
python3 - "$secrets/.env" "$@" <<'EOF'
import json, os, sys, time, urllib.error, urllib.request
from pathlib import Path

secrets, *given = sys.argv[1:]
wanted = [(dag, json.loads(conf)) for dag, conf in zip(given[::2], given[1::2], strict=True)]
ports = ("AIRFLOW_PORT", "MLFLOW_PORT", "API_PORT")
airflow, mlflow, api = (f"http://127.0.0.1:{os.environ[name]}" for name in ports)
lines = [line for line in Path(secrets).read_text().splitlines() if "=" in line]
known = dict(line.split("=", 1) for line in lines)
password = known["AIRFLOW_ADMIN_PASSWORD"]
headers = {address: {"Content-Type": "application/json"} for address in (airflow, mlflow, api)}


def ask(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    own = next(own for address, own in headers.items() if url.startswith(f"{address}/"))
    with urllib.request.urlopen(urllib.request.Request(url, data, own, method=method), timeout=60) as answer:
        return json.load(answer)


def refused(*request, code=401):
    try:
        ask(*request)
    except urllib.error.HTTPError as error:
        return error.code == code
    return False


assert refused(f"{airflow}/api/v2/dags"), "Airflow answers without a login"
assert refused(f"{airflow}/auth/token", {"username": "admin", "password": "admin"}), "Airflow takes a wrong password"
token = ask(f"{airflow}/auth/token", {"username": "admin", "password": password})["access_token"]
headers[airflow]["Authorization"] = f"Bearer {token}"


def run_dag(dag, conf):
    "Start a DAG and wait for its end; the id of its run, and its state"
    for _ in range(60):  # a healthy stack may still be reading its DAGs
        if any(found["dag_id"] == dag for found in ask(f"{airflow}/api/v2/dags?limit=100")["dags"]):
            break
        time.sleep(2)
    ask(f"{airflow}/api/v2/dags/{dag}", {"is_paused": False}, "PATCH")
    run = ask(f"{airflow}/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
    print(f"{dag}: started {run}", flush=True)
    start, state = time.monotonic(), ""
    while state not in ("success", "failed"):
        assert time.monotonic() - start < 1800, f"{dag}: still {state} after half an hour"
        time.sleep(3)
        state = ask(f"{airflow}/api/v2/dags/{dag}/dagRuns/{run}")["state"]
    for task in ask(f"{airflow}/api/v2/dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"]:
        print(f"  {task['task_id']:<12} {task['state']:<10} {task['duration'] or 0:5.1f} s")
    print(f"{dag}: {state} after {time.monotonic() - start:.0f} s")
    return run, state


def check_record(dag, run, state):
    "MLflow holds one finished run with a nested one for each step, and each step's notebook as file and page"
    experiment = ask(f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={dag}")["experiment"]
    query = {"experiment_ids": [experiment["experiment_id"]], "filter": f"tags.`mlpkg.dag_run_id` = '{run}'"}
    runs = ask(f"{mlflow}/api/2.0/mlflow/runs/search", query)["runs"]
    tags = {r["info"]["run_id"]: {t["key"]: t["value"] for t in r["data"]["tags"]} for r in runs}
    parents = [r["info"] for r in runs if tags[r["info"]["run_id"]]["mlpkg.kind"] == "pipeline"]
    steps = [r["info"] for r in runs if tags[r["info"]["run_id"]]["mlpkg.kind"] == "step"]
    for info in parents + steps:
        print(f"  {info['run_name']:<40} {info['status']}")
    assert state == "success" and [info["status"] for info in parents] == ["FINISHED"], "the run did not succeed"
    assert steps and all(info["status"] == "FINISHED" for info in steps), "a step is not recorded as finished"
    for info in steps:
        own = tags[info["run_id"]]
        assert own["mlflow.parentRunId"] == parents[0]["run_id"], f"{info['run_name']} is not nested"
        listed = ask(f"{mlflow}/api/2.0/mlflow/artifacts/list?run_id={info['run_id']}&path=notebook").get("files", [])
        wanted = {f"notebook/{own['mlpkg.step']}.{kind}" for kind in ("ipynb", "html")}
        assert wanted <= {file["path"] for file in listed}, f"{info['run_name']} has no executed notebook"
    print(f"mlflow: one run, {len(steps)} nested steps, each with its executed notebook")


def check_api(trained):
    "The API takes its key only, and answers with the champion once there is one"
    for path in ("v1/model", "metrics", "docs", "openapi.json"):
        assert refused(f"{api}/{path}"), f"the API answers /{path} without a key"
    headers[api]["X-API-Key"] = known["API_KEY"]
    for _ in range(60 if trained else 0):  # it looks for a new champion every few seconds
        if not refused(f"{api}/v1/model", code=503):
            print(f"api: model version {ask(f'{api}/v1/model')['version']} answers")
            return
        time.sleep(2)
    assert not trained, "the API does not take up the champion"
    assert refused(f"{api}/v1/model", code=503), "the API has a model that nobody has trained"
    print("api: accepts its key, and waits for a champion")


for dag, conf in wanted:
    check_record(dag, *run_dag(dag, conf))
check_api("flights_train" in dict(wanted))
EOF
