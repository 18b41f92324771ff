"""The Makefile sets up the virtual environment when, and only when, what is installed has changed.

A stand-in for the interpreter writes down its arguments, because a real set-up takes minutes.
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

INSTALLED = ["requirements.lock", "pyproject.toml", "setup.py", "tools/install.py"]

PYTHON = """#!/bin/bash
echo "$@" >> calls
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/bash\\necho "$@" >> calls\\n' > "$3/bin/python"
    chmod +x "$3/bin/python"
fi
"""


@pytest.fixture
def checkout(tmp_path):
    "A folder with the Makefile and what it installs from"
    for name in ["Makefile", *INSTALLED]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def setups(checkout) -> int:
    "Run `make setup` and return how often packages have been installed so far"
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "setup", "PYTHON=./python"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (checkout / "calls").read_text().count("tools/install.py")


def test_a_new_modification_time_alone_sets_nothing_up(checkout):
    assert setups(checkout) == 1
    for name in INSTALLED:
        os.utime(checkout / name, (4e9, 4e9))
    assert setups(checkout) == 1


@pytest.mark.parametrize("name", INSTALLED)
def test_a_change_sets_up_again_and_so_does_undoing_it(checkout, name):
    assert setups(checkout) == 1
    before = (checkout / name).read_text()
    (checkout / name).write_text(before + "\n# changed\n")
    os.utime(checkout / name, (0, 0))
    assert setups(checkout) == 2, "whatever time the file has"
    (checkout / name).write_text(before)
    assert setups(checkout) == 3, "what was installed last is not what the file says"


def test_a_set_up_that_failed_is_repeated(checkout):
    text = (checkout / "python").read_text()
    (checkout / "python").write_text("#!/bin/bash\nexit 1\n")
    failed = subprocess.run(["make", "setup", "PYTHON=./python"], cwd=checkout, capture_output=True)
    assert failed.returncode != 0
    (checkout / "python").write_text(text)
    assert setups(checkout) == 1


def test_an_interrupted_set_up_is_not_taken_for_the_one_before_it(checkout):
    assert setups(checkout) == 1
    lock, whole = checkout / "requirements.lock", (checkout / "python").read_text()
    before = lock.read_text()
    lock.write_text(before + "\n# changed\n")
    (checkout / "python").write_text(whole.replace(">> calls\\n'", ">> calls; exit 1\\n'"))
    failed = subprocess.run(["make", "setup", "PYTHON=./python"], cwd=checkout, capture_output=True)
    assert failed.returncode != 0
    lock.write_text(before)
    (checkout / "python").write_text(whole)
    assert setups(checkout) == 3, "what is installed is neither the one nor the other"


@pytest.fixture
def install(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import install

    yield install
    del sys.modules["install"]


def test_uv_is_told_what_pip_is_configured_with(install):
    listed = "\n".join(
        [
            ":env:.disable-pip-version-check='1'",
            "global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'",
            "global.find-links='/wheels /more'",
            ":env:.index-url='https://mirror.example/simple'",
        ]
    )
    assert install.uv_settings(listed) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
    }


def test_uv_itself_comes_from_the_lock_with_its_hashes(install):
    lines = install.locked("uv", install.LOCK.read_text())
    assert lines.startswith("uv==") and "--hash=sha256:" in lines and "uvicorn" not in lines
    with pytest.raises(SystemExit, match="has no nothing: make lock"):
        install.locked("nothing", "uv==1\n")


@pytest.mark.parametrize("uv", ["/nowhere/uv", "false"])
def test_where_uv_does_not_work_pip_installs_everything(install, tmp_path, monkeypatch, uv):
    "The lock and the project; stand-ins write down what they are asked, for the reason above"
    calls, pip = tmp_path / "calls", tmp_path / "pip"
    pip.write_text(f'#!/bin/bash\necho "$@" >> {calls}\n')
    pip.chmod(0o755)
    for name, stand_in in {"sys.prefix": str(tmp_path), "sys.executable": str(pip), "PIP": [pip], "UV": [uv]}.items():
        monkeypatch.setattr(f"install.{name}", stand_in)
    (tmp_path / "mlpkg").write_text("#!/bin/bash\n")
    (tmp_path / "mlpkg").chmod(0o755)
    install.main()
    _, _, lock, project = calls.read_text().splitlines()
    assert lock.startswith("install --quiet --require-hashes --requirement") and lock.endswith("requirements.lock")
    assert project.startswith("install --quiet --no-deps --no-build-isolation --editable")
