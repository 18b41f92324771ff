"""Installs requirements.lock, and this project, into the environment of the interpreter that runs it.

uv does it, in parallel and several times as fast as pip; uv itself comes from the lock, by pip. uv does not read what
pip is configured with (a mirror, a folder of wheels, a certificate), so it is told here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
WHEELS = ROOT / "wheels"  # Of packages that no index has
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
UV = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet", "--python", sys.executable]
NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "trusted-host": "UV_INSECURE_HOST",
    "client-cert": "SSL_CLIENT_CERT",
    "timeout": "UV_HTTP_TIMEOUT",
    "proxy": "HTTPS_PROXY",
}


def uv_settings(configured: str) -> dict[str, str]:
    "Environment variables for uv from what `pip config list` prints"
    # Whichever index has a file, the hash decides whether it is the right one
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for _, name, value in re.findall(r"^(global|install|:env:)\.([a-z-]+)='(.*)'$", configured, re.MULTILINE):
        if name in NAMES:
            links = name == "find-links"
            found[NAMES[name]] = (",".join if links else " ".join)(value.replace("\\n", " ").split())
    return found


def locked(name: str, lock: str) -> str:
    "The lines of one package in the lock"
    lines = re.search(rf"^{name}==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    if lines is None:
        sys.exit(f"{LOCK.name} has no {name}: make lock")
    return lines[0]


def succeeds(command: list, env: dict[str, str]) -> bool:
    "Run a command; what keeps it from starting is printed"
    try:
        return subprocess.run(command, env=env).returncode == 0
    except OSError as error:
        print(error, file=sys.stderr)
        return False


def main() -> None:
    "Install"
    own = Path(sys.prefix) / "uv.lock"
    own.write_text(locked("uv", LOCK.read_text()))
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", own], check=True)
    told = subprocess.run([*PIP, "config", "list"], check=True, capture_output=True, text=True).stdout
    env = {**uv_settings(told), **os.environ}
    # As in pip's case, modules are compiled now: otherwise each of the first processes would do it
    offline = ["--no-index"] if re.search(r"\.no-index='(1|true|yes|on)'", told, re.IGNORECASE) else []
    wheels = ["--find-links", WHEELS] if WHEELS.is_dir() else []
    install, lock = UV, [*wheels, "--require-hashes", "--requirement", LOCK]
    if not succeeds([*UV, *offline, "--compile-bytecode", *lock], env):
        print("uv could not install, for the reason above. pip does it now, which takes some minutes.", flush=True)
        install = [*PIP, "install", "--quiet"]
        subprocess.run([*install, *lock], check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True, env=env)
    subprocess.run([Path(sys.executable).parent / "mlpkg", "kernels", "install"], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"the command failed: {' '.join(map(str, error.cmd))}")
