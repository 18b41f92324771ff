"""Steps that end badly: real kernels, real signals, a real MLflow server that goes away. A page cannot kill itself."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from pathlib import Path

import pytest
from conftest import processes_with, wait_for

from mlpkg.steps.execution import StepError
from mlpkg.steps.outbox import Entry, waiting
from mlpkg.steps.parameters import ParameterError
from mlpkg.steps.recovery import recover
from mlpkg.steps.run import run_step
from mlpkg.steps.tracking import TrackingError, client, open_pipeline_run, step_runs

RUN = "import sys; from mlpkg.steps.run import run_step; run_step(sys.argv[1])"
RUN_ALL = """
import sys
from mlpkg.steps.run import run_step
for notebook in sys.argv[1:]:
    try:
        run_step(notebook)
        print("ran to its end")
    except RuntimeError as error:
        print(error)
"""
SLOW = "import os, time\nprint('started')\nopen('{marker}', 'w').close()\ntime.sleep(120)"


def last_run(project):
    "The latest run of a step that stands alone"
    experiment = project.mlflow.get_experiment_by_name("steps").experiment_id
    return project.mlflow.search_runs([experiment], order_by=["attributes.start_time DESC"])[0]


def fails(project, notebook, contains: str, error=StepError, **kwargs):
    "Run a notebook that fails and return the run it left"
    with pytest.raises(error) as raised:
        run_step(notebook, settings=kwargs.pop("settings", project.settings), **kwargs)
    assert contains in str(raised.value)
    run = last_run(project)
    assert run.info.status == "FAILED"
    assert f"{run.data.tags['mlpkg.step']}.ipynb" in project.artifacts(run)
    assert waiting(project.settings) == []
    return run


def statuses(nb) -> list[str]:
    "Status of each cell of the source in an executed notebook"
    added = {"injected-parameters", "papermill-error-cell-tag"}
    return [c.metadata.papermill["status"] for c in nb.cells if not added & set(c.metadata.get("tags", []))]


def with_limits(project, **limits):
    "The project's settings with other limits for steps"
    return project.settings.model_copy(update={"steps": project.settings.steps.model_copy(update=limits)})


def test_a_notebook_that_raises(project):
    notebook = project.notebook("raises", "x: int = 1", "x / 0", "print('never')")
    run = fails(project, notebook, "cell 2 (`x / 0`): ZeroDivisionError: division by zero")
    nb = project.stored(run)
    assert statuses(nb) == ["completed", "failed", "pending"]
    assert nb.metadata.mlpkg["status"] == "FAILED"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import pandas as pd\n\ntable = pd.DataFrame({'a': [1]})\ntable['b'].mean()",
            "cell 2 (`table['b'].mean()`): KeyError: 'b'",
        ),
        ("import warnings\nwarnings.warn('soon gone', FutureWarning)\n{}['b']", "cell 2 (`{}['b']`): KeyError: 'b'"),
        ("def half(n):\n    return 1 / n\n\nfor n in (1, 0):\n    half(n)", "cell 2 (`half(n)`): ZeroDivisionError"),
        ("x = 1\nfrom no_such_package import y", "cell 2 (`from no_such_package import y`): No module named"),
        ("x = 1\nassert x == 2", "cell 2 (`assert x == 2`): AssertionError"),
        ("x = 1\ny = ]", "cell 2 (`y = ]`): SyntaxError"),
    ],
    ids=["library", "warning", "function", "import", "assertion", "syntax"],
)
def test_the_line_that_is_quoted_is_the_one_that_failed(project, code, says):
    run = fails(project, project.notebook("raises", "x: int = 1", code), says)
    assert not run.data.tags["mlpkg.failure.error"].endswith(": ")


def test_a_cell_that_exceeds_its_time_limit(project):
    notebook = project.notebook("slow", "x: int = 1", "import time; time.sleep(60)")
    run = fails(project, notebook, "the cell ran longer than 1 s", settings=with_limits(project, cell_timeout=1))
    nb = project.stored(run)
    assert statuses(nb) == ["completed", "failed"]
    assert "This step was failed in cell 2" in nb.cells[0].source


def test_a_notebook_that_exceeds_the_time_limit_of_the_step(project):
    notebook = project.notebook("long", "x: int = 1", "import time; time.sleep(1)", "time.sleep(300)")
    limited = with_limits(project, timeout=15)
    run = fails(project, notebook, "the step ran longer than 15 s (steps.timeout in settings.ini)", settings=limited)
    assert run.data.tags["mlpkg.failure.cell"].startswith("cell ")
    assert statuses(project.stored(run))[-1] in ("failed", "pending")


def test_a_step_that_exceeds_the_time_limit_of_its_airflow_task(project):
    from airflow.sdk.execution_time.timeout import timeout

    notebook = project.notebook("hangs", "x: int = 1", "import time; time.sleep(300)")
    with timeout(20):
        run = fails(project, notebook, "AirflowTaskTimeout: Timeout, PID:")
    assert statuses(project.stored(run))[-1] == "failed"
    assert not kernels(project)


@pytest.mark.parametrize("code", ["sys.exit()", "sys.exit(0)", "sys.exit(3)", "raise SystemExit"])
def test_a_notebook_that_exits(project, code):
    notebook = project.notebook("exits", "x: int = 1", f"import sys\n{code}", "print('never')")
    run = fails(project, notebook, "cell 2 (`import sys`)")
    assert "never" not in str([c.get("outputs") for c in project.stored(run).cells])


def test_a_kernel_that_dies(project):
    notebook = project.notebook("dies", "x: int = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "x")
    run = fails(project, notebook, "the kernel was killed by SIGKILL (out of memory?)")
    assert statuses(project.stored(run)) == ["completed", "failed", "pending"]


def test_a_cell_that_prints_50_mb(project):
    notebook = project.notebook("prints", "x: int = 1", "for _ in range(50): print('x' * 1_000_000)")
    result = run_step(notebook, settings=project.settings)
    run = project.mlflow.get_run(result.run_id)
    text = "".join(output.text for output in project.stored(run).cells[1].outputs)
    assert len(text) < 1_100_000
    assert "more characters were dropped here: steps.output_limit in settings.ini" in text


PLOT = """
import base64
from IPython.display import Image, display
png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
display(Image(base64.b64decode(png)), metadata={"image/png": {}})
"""


def test_a_plot_has_an_alternative_text(project, caplog):
    titled = f"class ax:\n    set_title = print\nax.set_title('Late by month'){PLOT}"
    notebook = project.notebook("plots", "x: int = 1", PLOT, titled)
    result = run_step(notebook, settings=project.settings)
    page = project.mlflow.download_artifacts(result.run_id, "notebook/plots.html", str(project.root))
    html = Path(page).read_text()
    assert 'alt="Plot of cell 2"' in html and 'alt="Late by month"' in html
    assert "Alternative text" not in caplog.text


def test_bytes_that_are_not_text(project):
    cell = "import os\nos.write(1, b'\\xff\\xfe caf\\xe9\\n')\nprint('\\ud800')"
    result = run_step(project.notebook("bytes", "x: int = 1", cell), settings=project.settings)
    run = project.mlflow.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert project.artifacts(run) == ["bytes.html", "bytes.ipynb"]
    text = "".join(output.text for output in project.stored(run).cells[-1].outputs)
    assert "?" in text, "the output with half a character was lost"


def test_an_unknown_kernel(project):
    kernel = {"name": "julia-1.9", "display_name": "Julia", "language": "julia"}
    notebook = project.notebook("julia", "x: int = 1", kernel=kernel)
    fails(project, notebook, "unknown kernel 'julia-1.9' (installed: python3)")


def kernel_made_of(project, code: str) -> dict:
    "A kernel that runs this code and never answers, installed in the project"
    spec = project.root / "kernels" / "odd" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-c", code, "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "Odd", "language": "python"}))
    return {"name": "odd", "display_name": "Odd", "language": "python"}


def test_a_kernel_that_does_not_start(project, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(project.root))
    kernel = kernel_made_of(project, "print('looking for it')\nimport package_of_old")
    why = "the kernel 'odd' did not start: ModuleNotFoundError: No module named 'package_of_old'"
    run = fails(project, project.notebook("old", "x: int = 1", kernel=kernel), why)
    assert "Traceback (most recent call last)" in run.data.tags["mlpkg.failure.traceback"]


def test_a_kernel_that_starts_too_slowly(project, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(project.root))
    notebook = project.notebook("waits", "x: int = 1", kernel=kernel_made_of(project, "import time; time.sleep(60)"))
    why = "the kernel 'odd' did not start: it did not answer within 2 s (steps.start_timeout in settings.ini)"
    fails(project, notebook, why, settings=with_limits(project, start_timeout=2))


def test_notebooks_without_and_with_two_parameters_cells(project):
    fails(project, project.notebook("none", "x = 1", tags=()), "no cells tagged 'parameters'", ParameterError)
    two = project.notebook("two", "x = 1")
    nb = json.loads(two.read_text())
    nb["cells"].append({**nb["cells"][0], "id": "second"})
    two.write_text(json.dumps(nb))
    fails(project, two, "2 cells tagged 'parameters' (cells 1, 2)", ParameterError)


def test_parameters_that_do_not_fit(project):
    notebook = project.notebook("typed", "month: str  # First month\nseed: int = 0")
    fails(project, notebook, "missing parameter 'month': str (First month)", ParameterError)
    given = {"month": "2013-01", "seed": "many", "sead": 1}
    run = fails(project, notebook, "parameter 'seed' is declared int, got 'many'", ParameterError, parameters=given)
    assert (
        "unknown parameter 'sead' (declared: month, seed); did you mean 'seed'?" in run.data.tags["mlpkg.failure.error"]
    )


def test_secrets_stay_out_of_what_is_stored_and_logged(project, monkeypatch, caplog):
    monkeypatch.setenv("WAREHOUSE_PASSWORD", "a-very-secret-word")
    cell = "import os\nprint(os.environ['WAREHOUSE_PASSWORD'])\nraise ValueError(os.environ['WAREHOUSE_PASSWORD'])"
    notebook = project.notebook("leaks", "x: int = 1", cell)
    with caplog.at_level("INFO"), pytest.raises(StepError) as raised:
        run_step(notebook, settings=project.settings)
    run = last_run(project)
    stored = json.dumps(project.stored(run)) + json.dumps(dict(run.data.tags))
    logged = caplog.text + "".join(traceback.format_exception(raised.value))
    assert "a-very-secret-word" not in stored + logged
    assert "ValueError: ***" in run.data.tags["mlpkg.failure.error"] and "ValueError: ***" in logged


def start_slow_step(project, **env: str):
    "A step in a process of its own, in the middle of its second cell"
    marker = project.root / "started"
    notebook = project.notebook("slow", "x: int = 1", SLOW.format(marker=marker), "x")
    process = project.start(sys.executable, "-c", RUN, str(notebook), **env)
    wait_for(marker.exists, what="the second cell")
    return process


def kernels(project) -> list[int]:
    "Kernel processes of this project"
    words = ("ipykernel_launcher", "mlpkg.steps.template")
    return [pid for pid in processes_with(str(project.root)) if any(word in command_line(pid) for word in words)]


def command_line(pid: int) -> str:
    return subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout


cold = {"MLPKG_KERNELS__WARM": "no"}  # A template for warm ones outlives a step, and has a folder of its own


@pytest.fixture
def temporary():
    "A temporary folder for the processes of a test; its path is short enough for a kernel's sockets"
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_step_leaves_nothing_behind_and_its_kernel_dies_silently(project, temporary):
    sources = {"ends": "x", "fails": "x / 0", "sleeps": "import time; time.sleep(60)", "dies": "import os; os.abort()"}
    notebooks = [str(project.notebook(name, "x: int = 1", cell)) for name, cell in sources.items()]
    env = {"TMPDIR": str(temporary), "MLPKG_STEPS__CELL_TIMEOUT": "8", **cold}
    process = project.start(sys.executable, "-c", RUN_ALL, *notebooks, **env)
    output, _ = process.communicate(timeout=180)
    for said in ("ran to its end", "division by zero", "ran longer than 8 s", "killed by SIGABRT"):
        assert said in output
    assert "IPKernelApp" not in output and "KeyboardInterrupt" not in output
    assert list(temporary.iterdir()) == []


def test_a_step_that_is_terminated_leaves_nothing_behind(project, temporary):
    process = start_slow_step(project, TMPDIR=str(temporary), **cold)
    assert [path.name.split("-")[0] for path in temporary.iterdir()] == ["mlpkg"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert list(temporary.iterdir()) == []


def test_the_next_step_removes_what_a_killed_step_left_behind(project, temporary):
    process = start_slow_step(project, TMPDIR=str(temporary), **cold)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not kernels(project), 15, "the end of the kernel")
    assert list(temporary.glob("mlpkg-*/k-*"))
    run_step(project.notebook("next", "x: int = 1"), settings=project.settings)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_that_is_terminated(project, number):
    process = start_slow_step(project)
    assert kernels(project)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not kernels(project), 10, "the end of the kernel")
    run = last_run(project)
    assert run.info.status == "KILLED"
    nb = project.stored(run)
    assert statuses(nb) == ["completed", "killed", "pending"]
    assert nb.metadata.mlpkg["status"] == "KILLED"
    assert "This step was killed in cell 2" in nb.cells[0].source
    assert waiting(project.settings) == []


def test_a_step_whose_process_is_killed_outright(project):
    process = start_slow_step(project)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not kernels(project), 15, "the end of the kernel")
    assert last_run(project).info.status == "RUNNING"
    assert recover(project.settings) == [last_run(project).info.run_id]
    run = last_run(project)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlpkg.failure.error"] == "the process that ran this step was killed"
    nb = project.stored(run)
    assert statuses(nb) == ["completed", "killed", "pending"]
    assert nb.metadata.papermill["exception"] is True


def test_a_dag_run_that_is_terminated(project):
    marker = project.root / "started"
    project.notebook("10_count", "rows: int = 3", SLOW.format(marker=marker))
    process = project.start(sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "small")
    wait_for(marker.exists, 120, what="the second cell")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    (run,) = project.pipeline_runs("small")
    (step,) = project.steps(run).values()
    assert (run.info.status, step.info.status) == ("KILLED", "KILLED")
    assert not kernels(project)


def test_a_dag_run_whose_process_is_killed_outright(project):
    marker = project.root / "started"
    project.notebook("10_count", "rows: int = 3", SLOW.format(marker=marker))
    process = project.start(sys.executable, "-c", "from mlpkg.cli.main import main; main()", "run", "small")
    wait_for(marker.exists, 120, what="the second cell")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not kernels(project), 15, "the end of the kernel")
    assert "0 left" in project.mlpkg("sync")
    (run,) = project.pipeline_runs("small")
    (step,) = project.steps(run).values()
    assert (run.info.status, step.info.status) == ("KILLED", "KILLED")


class Server:
    "A real MLflow server on loopback"

    def __init__(self, project):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.project, self.uri = project, f"http://127.0.0.1:{self.port}"

    def start(self):
        var = self.project.root / "var"
        stores = ["--backend-store-uri", f"sqlite:///{var}/mlflow.db", "--artifacts-destination", f"{var}/served"]
        command = [sys.executable, "-m", "mlflow", "server", *stores, "--port", str(self.port), "--workers", "1"]
        self.process = self.project.start(*command)
        wait_for(self.answers, 90, "the start of MLflow")

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def server(project):
    made = Server(project)
    made.start()
    yield made
    made.stop()


def served(project, server):
    tracking = project.settings.tracking.model_copy(update={"uri": server.uri, "artifacts": None})
    return project.settings.model_copy(update={"tracking": tracking})


def test_mlflow_that_is_unreachable_at_the_start(project):
    settings = project.settings
    away = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    with pytest.raises(TrackingError, match=r"MLflow at http://127.0.0.1:9 cannot be reached.*Start it"):
        run_step(project.notebook("any", "x = 1"), settings=away)
    output = project.mlpkg("run", "small", code=2, MLPKG_TRACKING__URI="http://127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in output and "Traceback" not in output


def test_mlflow_that_is_lost_in_the_middle(project, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    settings = served(project, server)
    stop = f"import os, signal\nos.killpg({server.process.pid}, signal.SIGKILL)"
    notebook = project.notebook("lost", "x: int = 1", stop, "print('reached the end')")
    with pytest.raises(TrackingError, match=r"executed notebook is kept at .*lost\.ipynb; `mlpkg sync` uploads it"):
        run_step(notebook, settings=settings)
    server.process.communicate()
    (kept,) = waiting(settings)
    assert "reached the end" in (kept / "lost.ipynb").read_text()

    server.start()
    assert "0 left" in project.mlpkg("sync", MLPKG_TRACKING__URI=server.uri)
    run = last_run(project)
    assert run.info.status == "FINISHED" and not kept.exists()
    stored = client(settings).list_artifacts(run.info.run_id, "notebook")
    assert [file.path for file in stored] == ["notebook/lost.html", "notebook/lost.ipynb"]


def test_steps_with_the_same_parent_stay_apart(project):
    parent = open_pipeline_run(project.mlflow, project.settings, "demo", "manual__1")
    for rows in (1, 2):
        run_step(project.notebook("count", "rows: int = 0"), {"rows": rows}, parent=parent, settings=project.settings)
    assert [run.data.params["rows"] for run in step_runs(project.mlflow, parent)] == ["1", "2"]


@pytest.mark.parametrize("writes", [0, 1])
def test_a_disk_that_is_full_when_a_step_starts(project, monkeypatch, writes):
    notebook, done, save = project.notebook("10_count", "rows: int = 3"), [], Entry.save

    def save_while_there_is_room(entry):
        if len(done) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(entry)
        done.append(entry)

    monkeypatch.setattr(Entry, "save", save_while_there_is_room)
    with pytest.raises(OSError, match="No space left on device"):
        run_step(notebook, settings=project.settings)
    run = last_run(project)
    assert run.info.status == "FAILED"
    assert "No space left on device" in run.data.tags["mlpkg.failure.error"]
    assert waiting(project.settings) == []
