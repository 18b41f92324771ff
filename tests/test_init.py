"""`mlpkg init`: a repository of a team's own, in which the commands of its README work at once."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_mlpkg
from typer.testing import CliRunner

KEPT = ("PATH", "LANG", "PIP_", "UV_", "SSL_", "XDG_CACHE_HOME")


def environment(home: Path) -> dict[str, str]:
    "That of somebody who has nothing but Python, git, make, and a download cache"
    own = str(Path(sys.prefix))
    env = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    env["PATH"] = os.pathsep.join(one for one in env["PATH"].split(os.pathsep) if not one.startswith(own))
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    for name in ("home", "run"):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    return env | {"HOME": str(home / "home"), "XDG_RUNTIME_DIR": str(home / "run"), "XDG_CACHE_HOME": cache}


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    "A repository called my-team"
    folder = tmp_path_factory.mktemp("init")
    code, said = run_mlpkg(["init", "my-team"], folder, dict(os.environ), 300)
    assert code == 0, said
    return folder / "my-team"


@pytest.fixture(scope="module")
def at_first(team):
    "Names of all its files and folders, before any command has run in it"
    return {path.relative_to(team).as_posix() for path in team.rglob("*") if ".git" not in path.parts}


@pytest.fixture(scope="module")
def told(team, at_first, tmp_path_factory):
    "What the commands of its README say, in the environment of a newcomer"
    env, found = environment(tmp_path_factory.mktemp("newcomer")), {}
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "add", "--all"], cwd=team, check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "As it was made"], cwd=team, check=True)
    for target in ("setup", "run", "test"):
        done = subprocess.run(["make", target], cwd=team, env=env, capture_output=True, text=True, timeout=1200)
        found[target] = (done.returncode, done.stdout + done.stderr)
    stop = [team / ".venv/bin/mlpkg", "kernels", "stop", "--all"]
    subprocess.run(stop, cwd=team, env=env, capture_output=True)
    return found


def test_setup_run_and_test_work_at_once(told):
    assert [code for code, _ in told.values()] == [0, 0, 0], "\n".join(said[-3000:] for _, said in told.values())
    assert "Model tumours version 1, alias champion" in told["run"][1]


def test_the_commands_change_no_file_of_it(told, team):
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=team, capture_output=True, text=True).stdout
    assert changed == ""


def test_it_has_nothing_superfluous_and_names_only_what_it_has(team, at_first):
    assert not at_first & {"__init__.py", ".ruff_cache", "build"}
    targets = set(re.findall(r"^([a-z-]+):", (team / "Makefile").read_text(), re.MULTILINE))
    for path in (
        team / "README.md",
        team / ".githooks/pre-commit",
        team / "docker-compose.yml",
        team / "tools/install.py",
    ):
        text = path.read_text()
        assert set(re.findall(r"[`'\"]make ([a-z-]+)", text)) - {"up,"} <= targets, path
        assert "production.ipynb" not in text


def test_the_example_can_be_removed_as_its_readme_says(team, tmp_path):
    copy = tmp_path / "my-team"
    shutil.copytree(team, copy, ignore=shutil.ignore_patterns(".venv", "var", "__pycache__"))
    command = re.search(r"^git rm .*$", (copy / "README.md").read_text(), re.MULTILINE)[0]
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "add", "--all"], cwd=copy, check=True)
    subprocess.run(["bash", "-ec", command.replace("git rm", "git rm --quiet -f")], cwd=copy, check=True)
    export = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export as export; export()"]
    subprocess.run(export, cwd=copy, check=True)
    assert not [path for path in copy.rglob("*tumours*") if ".git" not in path.parts]
    assert "tumours" not in (copy / "my_team" / "_modidx.py").read_text()


def test_it_says_nothing_of_where_it_was_made(team, at_first):
    for path in (team / name for name in at_first if not name.endswith(".whl")):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert str(team.parent) not in text and str(ROOT) not in text, path
            assert "flights" not in text or path.name == "requirements.lock", path


def test_the_lock_knows_the_wheel_and_names_no_index(team):
    wheel = next((team / "wheels").glob("mlpkg-*.whl"))
    lock = (team / "requirements.lock").read_text()
    assert re.search(r"^mlpkg==[\w.]+ \\\n    --hash=sha256:[0-9a-f]{64}$", lock, re.MULTILINE)
    assert "://" not in lock
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mlpkg/templates/shared/requirements.lock", "mlpkg/templates/shared/.githooks/pre-commit"} <= set(names)


def test_an_installed_mlpkg_makes_the_same_repository(team, tmp_path):
    "From a wheel, without the sources: packed again from what is installed"
    where, wheel = tmp_path / "installed", next((team / "wheels").glob("mlpkg-*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(where)]
    subprocess.run([*install, str(wheel)], check=True)
    code = "import pathlib, mlpkg.recipes.repository as made; made.make_repository(pathlib.Path('my-team'))"
    env = os.environ | {"PYTHONPATH": str(where)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {path.relative_to(team).as_posix() for path in team.rglob("*") if path.is_file()}
    kept = {name for name in kept if not re.match(r"\.venv|\.git/|var/|.*__pycache__|.*egg-info|\.\w+_cache", name)}
    for name in sorted(kept - {"requirements.lock"}):
        if not name.endswith(".whl"):
            assert (tmp_path / "my-team" / name).read_bytes() == (team / name).read_bytes(), name
    again = next((tmp_path / "my-team" / "wheels").glob("mlpkg-*.whl"))
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("7days", "cannot be the name of a package"),
        ("class", "cannot be the name of a package"),
        ("pandas", "the name of something else that Python would import: try 'pandas_ml'"),
        ("nowhere/team", "there is no folder"),
        ("full", "exists already, and is not empty"),
    ],
)
def test_a_name_or_folder_that_cannot_be_is_refused(tmp_path, monkeypatch, name, words):
    from mlpkg.cli.init import initing
    from mlpkg.errors import MlpkgError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    done = CliRunner().invoke(initing, [name])
    assert isinstance(done.exception, MlpkgError) and words in str(done.exception)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_a_repository_that_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    from mlpkg.recipes import repository

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(repository, "write_pipeline", fail)
    with pytest.raises(OSError, match="no space"):
        repository.make_repository(tmp_path / "team")
    assert list(tmp_path.iterdir()) == []


def test_the_stack_of_containers_has_a_name_of_its_own(team):
    text = (team / "docker-compose.yml").read_text()
    assert "name: my_team\n" in text and "image: my_team:local\n" in text
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed here, so it cannot read the file")
    secrets = {name: "x" for name in re.findall(r"\$\{(\w+):\?", text)}
    done = subprocess.run(
        ["docker", "compose", "config", "--quiet"], cwd=team, env=os.environ | secrets, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
