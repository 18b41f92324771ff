"""The production stack as written, and the script that makes its secrets. docker/smoke.sh brings the stack up."""

import base64
import configparser
import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlpkg.airflow.home import airflow_env

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(TEXT)["services"]
VARIABLES = re.findall(r"\$\{(\w+)([^}]*)\}", TEXT)  # Name and what follows it, like ":?run make env"
REQUIRED = {name for name, rest in VARIABLES if rest.startswith(":?")}
OURS = [name for name in SERVICES if name != "postgres"]
OPTIONAL = {"AIRFLOW_PORT", "MLFLOW_PORT", "API_PORT", "GIT_COMMIT"}


def environment(service: str) -> dict[str, str]:
    return SERVICES[service].get("environment", {})


def make_env(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docker" / "env.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603


def read_env(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_services():
    assert set(OURS) == {"init", "mlflow", "api", "api-server", "scheduler", "dag-processor", "triggerer"}


def test_every_variable_except_ports_and_the_commit_is_required():
    assert {name for name, _ in VARIABLES} - REQUIRED == OPTIONAL
    assert {rest for name, rest in VARIABLES if name in REQUIRED} == {":?run make env"}


@pytest.mark.parametrize("service", SERVICES)
def test_the_file_contains_no_secret(service):
    secret = re.compile(r"PASSWORD|SECRET|FERNET|_KEY$|TOKEN")
    for name, value in environment(service).items():
        if secret.search(name):
            assert re.fullmatch(r"\$\{\w+:\?run make env\}", value), f"{service}: {name}={value}"
        if "://" in value and "@" in value:
            assert re.search(r"://\w+:\$\{\w+:\?run make env\}@", value), f"{service}: {name}={value}"


def test_secrets_go_only_where_they_are_used():
    users = {name: [s for s in SERVICES if f"${{{name}:" in str(environment(s))] for name in REQUIRED}
    airflow = [name for name in OURS if name not in ("mlflow", "api")]
    assert users["POSTGRES_PASSWORD"] == ["postgres"]
    assert users["MLFLOW_DB_PASSWORD"] == ["postgres", "init", "mlflow"]
    assert users["AIRFLOW_DB_PASSWORD"] == ["postgres", *airflow]
    assert users["AIRFLOW_ADMIN_PASSWORD"] == ["init"]
    assert users["API_KEY_DIGEST"] == ["api"] and "${API_KEY:" not in TEXT, "no container gets the key itself"
    for name in ("AIRFLOW_FERNET_KEY", "AIRFLOW_SECRET_KEY", "AIRFLOW_JWT_SECRET"):
        assert users[name] == airflow


def test_ports_are_published_on_loopback_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)
    assert all("network_mode" not in service for service in SERVICES.values())


def test_images():
    assert {SERVICES[name]["image"] for name in OURS} == {"mlpkg:local"}
    assert [name for name in SERVICES if "build" in SERVICES[name]] == ["init"], "one build, used by all"
    assert re.fullmatch(r"postgres:\d+(\.\d+)*", SERVICES["postgres"]["image"])
    bases = re.findall(r"^FROM (\S+)", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert bases and all(re.fullmatch(r"python:3\.\d+\S*-bookworm", base) for base in bases)


@pytest.mark.parametrize("service", OURS)
def test_our_services_run_without_privileges(service):
    made = SERVICES[service]
    assert made["read_only"] and made["init"] and made["cap_drop"] == ["ALL"]
    assert "privileged" not in made and "cap_add" not in made and "user" not in made
    assert "/var/run/docker.sock" not in str(made)


def test_the_image_runs_as_an_ordinary_user():
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER mlpkg"]
    assert lines[-1] == "USER mlpkg"
    assert any("--require-hashes --requirement requirements.lock" in line for line in lines)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_limits_and_a_health_check(service):
    made = SERVICES[service]
    assert made["mem_limit"] and made["logging"]["options"]["max-size"]
    assert made["security_opt"] == ["no-new-privileges:true"]
    if service == "init":
        assert made["restart"] == "no"
    else:
        assert made["healthcheck"]["test"] and made["restart"] == "unless-stopped"


def test_only_listed_files_enter_the_build():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    named = [rule[1:] for rule in rules if rule.startswith("!")]
    hidden = [name for name in named if name.startswith(".")]
    assert hidden == [".githooks/pre-commit"] and not {"var", "docker", "tests"} & set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
    packed = (ROOT / "mlpkg" / "templates" / "shared.txt").read_text().split()
    assert set(packed) <= set(named), "the wheel that the image installs holds these"


def test_env_makes_what_compose_requires(tmp_path):
    done = make_env(tmp_path / ".env")
    assert done.returncode == 0, done.stderr
    made = read_env(tmp_path / ".env")
    assert made.keys() == REQUIRED | {"API_KEY"}
    assert made.pop("API_KEY_DIGEST") == hashlib.sha256(made["API_KEY"].encode()).hexdigest()
    assert len(set(made.values())) == len(made)
    for name, value in made.items():
        assert re.fullmatch(r"[\w-]{43}=?", value), name  # 256 bits, nothing to quote in .env, in SQL or in a URL
        assert value not in done.stdout + done.stderr
    assert len(base64.urlsafe_b64decode(made["AIRFLOW_FERNET_KEY"])) == 32


def test_only_its_owner_can_read_env(tmp_path):
    before = os.umask(0)
    try:
        make_env(tmp_path / ".env")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_env_never_overwrites(tmp_path):
    make_env(tmp_path / ".env")
    first = (tmp_path / ".env").read_text()
    done = make_env(tmp_path / ".env")
    assert done.returncode != 0 and "nothing was changed" in done.stderr
    assert (tmp_path / ".env").read_text() == first
    assert make_env("--force", tmp_path / ".env").returncode == 0
    assert not set(read_env(tmp_path / ".env").values()) & {line.partition("=")[2] for line in first.splitlines()}


def test_env_adds_what_a_newer_stack_asks_for(tmp_path):
    file = tmp_path / ".env"
    make_env(file)
    kept = {name: value for name, value in read_env(file).items() if name != "AIRFLOW_JWT_SECRET"}
    file.write_text("AIRFLOW_PORT=8081\n" + "".join(f"{name}={value}\n" for name, value in kept.items()))
    done = make_env(file)
    assert done.returncode == 0 and "AIRFLOW_JWT_SECRET" in done.stdout and "POSTGRES" not in done.stdout
    made = read_env(file)
    assert made.pop("AIRFLOW_JWT_SECRET")
    assert made == kept | {"AIRFLOW_PORT": "8081"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_env_never_leaves_the_digest_of_another_key(tmp_path):
    file = tmp_path / ".env"
    make_env(file)
    file.write_text(re.sub("^API_KEY=.*$", "", file.read_text(), flags=re.M))
    assert make_env(file).returncode == 0
    made = read_env(file)
    assert made["API_KEY_DIGEST"] == hashlib.sha256(made["API_KEY"].encode()).hexdigest()


def test_what_the_lake_spills_goes_to_a_volume_and_not_to_memory():
    profile = configparser.ConfigParser(interpolation=None)
    profile.read(ROOT / "settings.ini")
    spill = profile["production"]["lake.spill"]
    users = [name for name in OURS if f"lake:{profile['production']['lake.root']}" in SERVICES[name].get("volumes", [])]
    assert users == ["scheduler", "api"]
    assert all(f"spill:{spill}" in SERVICES[name]["volumes"] for name in users)
    assert "spill" in yaml.safe_load(TEXT)["volumes"]
    (folders,) = re.findall(r"install -d -o mlpkg .*", (ROOT / "docker" / "Dockerfile").read_text())
    assert spill in folders.split(), "a volume takes its owner from the folder in the image"


def test_the_scheduler_looks_for_tasks_as_often_as_on_a_laptop(project):
    name = "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME"
    assert environment("scheduler")[name] == airflow_env(project.settings)[name]
