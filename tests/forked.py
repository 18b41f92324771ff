"""`mlpkg` in a fork of a process that has imported the libraries: the tests start it a hundred times.

Airflow and `mlpkg` are not imported there, since they read the variables and the settings of a project when they are.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

LIBRARIES = (
    "IPython", "a2wsgi", "aiohttp", "aiosqlite", "alembic", "black", "bs4", "cadwyn", "cron_descriptor", "croniter",
    "deltalake", "fastapi", "ipykernel.connect", "jsonschema", "lazy_object_proxy", "libcst", "matplotlib.pyplot",
    "mlflow.pyfunc", "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking", "msgspec", "nbclient", "nbconvert", "nbformat.validator", "pandas", "papermill", "pendulum",
    "pyarrow.dataset", "pydantic_settings", "rich.live", "scrapbook", "sqlalchemy.ext.asyncio", "sqlalchemy.orm",
    "svcs.fastapi", "typer", "upath",
)  # fmt: skip
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # for the process that imports MLflow
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(list(LIBRARIES))


def be_mlpkg(output: Any, arguments: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
    "Become what a new process would be: with a session, a folder, an environment and streams of its own"
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    written, nothing = output.detach(), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(source, target)
    os.close(written)
    os.close(nothing)
    sys.argv = ["mlpkg", *arguments]
    from mlpkg.cli.main import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()


def run_mlpkg(
    arguments: Sequence[str], folder: Path, env: Mapping[str, str], timeout: float
) -> tuple[int, str]:  # Exit code, and what it wrote; the code of a signal if it takes too long
    "Run a command in a fork, and wait for it"
    with tempfile.TemporaryFile() as output:
        process = forks.Process(target=be_mlpkg, args=(DupFd(output.fileno()), arguments, folder, env))
        process.start()
        try:
            process.join(timeout)
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        output.seek(0)
        return process.exitcode, output.read().decode()
