"""Kernels from a template: the same as cold ones, ended with whoever asked, and cold where anything is off.

Real templates, launchers and kernels, each test module with a folder of its own for the sockets.
"""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import wait_for
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient

from mlpkg.settings import KernelSettings
from mlpkg.steps import launcher, supervisor
from mlpkg.steps.warm import install_kernelspec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="templates fork, which is safe on Linux only")
PRELOAD = ["ipykernel.kernelapp", "numpy", "pandas", "matplotlib.pyplot", "no_such_module"]
RULES = KernelSettings(preload=PRELOAD, idle=600, most=3)
OPTIONS = [str(os.getpid()), ",".join(RULES.preload), str(RULES.idle), str(RULES.most)]


@pytest.fixture(scope="module", autouse=True)
def sockets():
    "A folder for the sockets of this module's templates, with a short name, as Unix sockets need it; kernels are warm"
    with tempfile.TemporaryDirectory(prefix="mlpkg-test-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setattr(KernelProvisionerFactory.instance(), "default_provisioner_name", "mlpkg-warm")
        patch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", "mlpkg-warm")
        for name, value in (("WARM", "yes"), ("PRELOAD", ", ".join(PRELOAD)), ("IDLE", "600"), ("MOST", "3")):
            patch.setenv(f"MLPKG_KERNELS__{name}", value)
        yield Path(folder)
        for facts in templates():
            supervisor.kill(os.kill, facts["pid"], signal.SIGTERM)
            wait_for(lambda pid=facts["pid"]: not Path(f"/proc/{pid}").exists(), 20, "the end of a template")


def templates() -> list[dict]:
    from mlpkg.cli.kernels import running_templates

    return running_templates()


@pytest.fixture
def template(sockets) -> str:
    "The address of a template that is ready, the same for all tests unless those of other tests have retired it"
    address = launcher.template_address(sys.executable, RULES.preload)

    def ready() -> bool:
        if not launcher.alive(address):
            launcher.start_template(sys.executable, address, RULES.preload, RULES.idle, RULES.most)
        with contextlib.suppress(FileNotFoundError):
            os.utime(address)  # Or a template of an earlier test, ready only now, retires the one used longest ago
            return True
        return False

    wait_for(ready, 120, "a template")
    return address


@contextlib.contextmanager
def kernel(**options):
    "A running kernel, and a function that runs code in it and returns what it prints"
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(stderr=subprocess.PIPE, **options)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    try:
        yield manager, lambda code, timeout=60: run(client, code, timeout)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def run(client, code: str, timeout: float) -> str:
    said = []

    def hear(message):
        content = message["content"]
        said.append(content.get("text") or content.get("ename") or str(content.get("data", "")))

    client.execute_interactive(code, timeout=timeout, output_hook=hear)
    return "".join(said)


def launched(manager) -> int:
    "The launcher's process"
    return manager.provisioner.process.pid


def kernels(address: str) -> list[int]:
    line, facts = launcher.send_request(address, {"ask": "facts"})
    line.close()
    return [int(pid) for pid in facts["kernels"]]


def ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_kernel_comes_from_the_template_with_everything_imported(template):
    with kernel() as (_, ask):
        parent = int(ask("import os; print(os.getppid())"))
        assert parent in supervisor.descendants(kernels(template)[0], supervisor.parents()) or parent in kernels(
            template
        )
        assert ask("import sys; print('pandas' in sys.modules, 'mlpkg' in sys.modules)") == "True False\n"


SAME = """
import os, signal, sys
numbers = signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD, signal.SIGALRM
print(sys.path, sys.argv[0], sys.flags, sys.executable, os.getcwd(), sys.stdin, __name__, os.getsid(0) == os.getpid())
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(number) for number in numbers], os.umask(0o22))
print({name: os.environ[name] for name in sorted(os.environ) if name not in ("JPY_PARENT_PID", "MLPKG_KERNELS__WARM")})
"""


def test_it_is_like_a_cold_one(template, tmp_path, monkeypatch):
    monkeypatch.setenv("ONLY_HERE", "yes")
    with kernel(cwd=str(tmp_path)) as (manager, ask):
        warm = ask(SAME)
        ask("import os; os.write(2, b'heard')")
        assert b"heard" in os.read(manager.provisioner.process.stderr.fileno(), 100_000)
    monkeypatch.setenv("MLPKG_KERNELS__WARM", "no")
    with kernel(cwd=str(tmp_path)) as (_, ask):
        cold = ask(SAME)
    assert warm == cold and "ONLY_HERE" in warm


LIMITS = "import os, resource; print(os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NOFILE))"


def test_it_lives_under_the_limits_of_whoever_asks(template, monkeypatch):
    cores, limit = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        os.sched_setaffinity(0, {min(cores)})
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[0] - 7, limit[1]))
        assert launcher.template_address(sys.executable, RULES.preload) == template
        with kernel() as (_, ask):
            warm = ask(LIMITS)
            assert ask("import sys; print('pandas' in sys.modules)") == "True\n"
    finally:
        os.sched_setaffinity(0, cores)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert warm == f"{ {min(cores)} } {(limit[0] - 7, limit[1])}\n"


@pytest.mark.parametrize(
    "limit",
    [
        "os.nice(3)",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))",
        "open('/proc/self/oom_score_adj', 'w').write('7')",
    ],
)
def test_limits_that_cannot_be_taken_back_need_another_template(template, limit):
    code = f"""import os, resource, sys
from mlpkg.steps import launcher
{limit}
print(launcher.template_address(sys.executable, {RULES.preload}))"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(said).parent == Path(template).parent and said != template


def test_random_numbers_differ_from_kernel_to_kernel(template):
    draws = []
    for _ in range(2):
        with kernel() as (_, ask):
            draws.append(ask("import random, uuid, numpy; print(random.random(), uuid.uuid4(), numpy.random.rand())"))
    assert len(set(draws[0].split()) & set(draws[1].split())) == 0


def test_plots_are_shown(template):
    with kernel() as (_, ask):
        assert "image/png" in ask("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")


def test_what_a_notebook_does_to_a_library_stays_in_its_kernel(template):
    with kernel() as (_, ask):
        ask("import pandas; pandas.DataFrame = None")
        with kernel() as (_, other):
            assert other("import pandas; print(pandas.DataFrame is None)") == "False\n"


def test_an_interrupt_reaches_the_kernel(template):
    with kernel() as (manager, ask):
        threading.Timer(1, manager.interrupt_kernel).start()
        assert "KeyboardInterrupt" in ask("import time; time.sleep(60)")
        assert ask("print('goes on')") == "goes on\n"


def test_a_kernel_can_be_restarted_on_the_same_ports(template):
    with kernel() as (manager, ask):
        ask("x = 1")
        manager.restart_kernel(now=True)
        # The client that is there connects again; a second one of this manager would have the same identity for ZeroMQ.
        # What the kernel says before it has done so is lost, whether that is all of an answer or its first part.
        said = ""
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                said = said or ask("print('x' in globals())", timeout=20)
        assert said == "False\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_launcher_ends_as_the_kernel_did(template, number):
    with kernel() as (manager, ask):
        pid = int(ask("import os; print(os.getpid())"))
        os.kill(pid, number)
        expected = -number if number != signal.SIGTERM else manager.provisioner.process.wait(20)
        assert manager.provisioner.process.wait(20) == expected
        assert ended(pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_launcher(template, number):
    with kernel() as (manager, ask):
        words = (
            "import os, subprocess; print(os.getpid(), subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)"
        )
        pids = [int(word) for word in ask(words).split()]
        os.kill(launched(manager), number)
        wait_for(lambda: all(map(ended, pids)), 10, "the end of the kernel and of what it started")


def test_nothing_outlives_whoever_asked(template, tmp_path):
    script = tmp_path / "ask.py"
    script.write_text("""
import time
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(60)
say = lambda message: print(message["content"].get("text", ""), flush=True)
client.execute_interactive("import os; print(os.getpid())", output_hook=say)
time.sleep(100)
""")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pid = int(next(line for line in process.stdout if line.strip()))
    process.kill()
    process.communicate()
    wait_for(lambda: ended(pid), 10, "the end of the kernel")


@pytest.mark.parametrize("seconds", [0, 0.02, 0.05, 0.1, 0.2])
def test_nothing_outlives_who_is_killed_while_a_kernel_starts(template, tmp_path, seconds):
    script = tmp_path / "ask.py"
    script.write_text(f"""
import os, signal, threading, time
from jupyter_client.manager import KernelManager
from mlpkg.steps.warm import WarmProvisioner
launch = WarmProvisioner.launch_kernel
async def launch_kernel(self, cmd, **options):
    await launch(self, cmd, **options)
    open({str(tmp_path / "pid")!r}, "w").write(str(self.process.pid))
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGKILL)
WarmProvisioner.launch_kernel = launch_kernel
KernelManager(kernel_name="python3").start_kernel()
""")
    assert subprocess.run([sys.executable, str(script)], stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    launched = int((tmp_path / "pid").read_text())
    wait_for(lambda: ended(launched), 5, "the end of the launcher")
    wait_for(lambda: not kernels(template), 10, "the end of the kernel")


def test_the_next_kernel_starts_cold_where_there_are_enough(template):
    with kernel(), kernel(), kernel(), kernel() as (manager, ask):
        said = os.read(manager.provisioner.process.stderr.fileno(), 10_000).decode()
        assert "A cold start of the kernel, because the template has 3 kernels" in said
        assert ask("print('works')") == "works\n"


def test_what_cannot_be_preloaded_is_named(template):
    (facts,) = templates()
    assert facts["problems"] == {"no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"}


def begin(preload: list[str], **env) -> dict:
    "What a template of its own says of itself"
    env = {**os.environ, **env}
    address = launcher.template_address(sys.executable, preload, env)
    launcher.start_template(sys.executable, address, preload, 30, 3, env)
    wait_for(lambda: os.path.exists(address), 60, "a template")
    line, facts = launcher.send_request(address, {"ask": "facts"})
    line.close()
    os.kill(facts["pid"], signal.SIGTERM)
    return facts


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=[60], name='busy', daemon=True).start()",
            "busy",
        ),
        ("x = 1", "odd_module can be edited where it lies"),
    ],
    ids=["raises", "starts a thread", "can be edited"],
)
def test_a_module_that_would_make_forking_wrong_is_left_out(sockets, tmp_path, code, reason):
    (tmp_path / "odd_module.py").write_text(code)
    facts = begin(["json", "odd_module"], PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert list(facts["problems"]) == ["odd_module"] and reason in facts["problems"]["odd_module"]


HALF = """import helpers_of_it
import threading, time
threading.Thread(target=time.sleep, args=[60], name='busy', daemon=True).start()
import no_such_module
"""


def test_what_a_module_leaves_behind_that_fails_halfway_does_not_stay(sockets, tmp_path):
    (tmp_path / "half_module.py").write_text(HALF)
    (tmp_path / "helpers_of_it.py").write_text("x = 1")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    address = launcher.template_address(sys.executable, ["json", "half_module"], env)
    launcher.start_template(sys.executable, address, ["json", "half_module"], 30, 3, env)
    wait_for(lambda: os.path.exists(address), 60, "a template")
    line, facts = launcher.send_request(address, {"ask": "facts"})
    line.close()
    tasks = os.listdir(f"/proc/{facts['pid']}/task")
    os.kill(facts["pid"], signal.SIGTERM)
    assert list(facts["problems"]) == ["half_module"] and len(tasks) == 1


@pytest.mark.parametrize("code", ["import os; os._exit(3)", "import time; time.sleep(600)"])
def test_a_module_that_ends_or_holds_up_its_process_costs_only_itself(sockets, tmp_path, monkeypatch, code):
    from mlpkg.steps import probe

    (tmp_path / "deadly_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = probe.try_in_child(["deadly_module", "csv"], seconds=3)
    assert list(found) == ["deadly_module"] and "died, or took more than" in found["deadly_module"]


@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenMP has one thread on one core, which no child waits for")
def test_a_module_that_computes_with_openmp_is_left_out(tmp_path):
    (tmp_path / "early_module.py").write_text(
        "from sklearn.ensemble import HistGradientBoostingRegressor\n"
        "HistGradientBoostingRegressor(max_iter=2).fit([[0.0], [1.0]] * 5000, [0.0, 1.0] * 5000)\n"
    )
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; from mlpkg.steps import probe; " + (
        "probe.is_fixed = lambda module: True; probe.computes_early.__defaults__ = (5,); "
        "print(probe.try_in_child(['sklearn.ensemble', 'early_module']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{'early_module': 'it computes with OpenMP while it is imported'}", done.stderr


def test_matplotlib_takes_the_settings_beside_the_notebook(template, tmp_path):
    (tmp_path / "matplotlibrc").write_text("figure.figsize: 3, 3\n")
    code = "import matplotlib; print(matplotlib.rcParams['figure.figsize'], matplotlib.get_backend())"
    for folder, size in ((tmp_path, "[3.0, 3.0]"), ("/", "[6.4, 4.8]")):
        with kernel(cwd=str(folder)) as (_, ask):
            assert ask(code).startswith(f"{size} ") and "inline" in ask(code)


def test_a_file_that_a_module_holds_open_is_written_to_the_end(template, tmp_path):
    (tmp_path / "holder.py").write_text("f = open('out.csv', 'w')")
    with kernel(cwd=str(tmp_path)) as (_, ask):
        ask("import holder; holder.f.write('a,b\\n1,2\\n')")
    assert (tmp_path / "out.csv").read_text() == "a,b\n1,2\n"


def test_a_template_waits_for_its_keeper(sockets):
    keeper = subprocess.Popen(["sleep", "600"])
    address = launcher.template_address(sys.executable, ["json", "csv"])
    try:
        launcher.start_template(sys.executable, address, ["json", "csv"], 0.5, 3, keeper=keeper.pid)
        wait_for(lambda: os.path.exists(address), 60, "a template")
        time.sleep(3)
        assert launcher.alive(address)
    finally:
        keeper.kill()
        keeper.wait()
    wait_for(lambda: not launcher.alive(address), 20, "the end of a template without a keeper")


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "OPENSSL_CONF", "KERAS_BACKEND", "MSGPACK_PUREPYTHON", "DECIMAL_X"]
)
def test_another_environment_has_another_template(sockets, monkeypatch, name):
    preload = [*PRELOAD, "decimal"]  # whose variables count, whatever they are
    before = launcher.template_address(sys.executable, preload)
    monkeypatch.setenv(name, "1")
    assert launcher.template_address(sys.executable, preload) != before


def test_a_distribution_that_is_installed_changes_the_address(sockets, tmp_path):
    site = tmp_path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    site.mkdir(parents=True)
    python = str(tmp_path / "bin" / "python")
    before = launcher.template_address(python, PRELOAD)
    (site / "pandas-9.9.9.dist-info").mkdir()
    assert launcher.template_address(python, PRELOAD) != before


def start_cold(**env) -> str:
    "What a launcher says when it turns into the plain command, here `echo`"
    command = [
        sys.executable,
        "-I",
        "-S",
        launcher.__file__,
        *OPTIONS,
        "echo",
        sys.executable,
        "-m",
        "ipykernel_launcher",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)
    assert "-m ipykernel_launcher" in done.stdout
    return done.stderr


def test_a_folder_of_somebody_else_is_not_used(tmp_path):
    (tmp_path / f"mlpkg-templates-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"mlpkg-templates-{os.getuid()}").chmod(0o777)
    assert "is not a folder that this user alone can enter" in start_cold(XDG_RUNTIME_DIR=str(tmp_path))


def pid_at(address: str) -> int:
    "The process of the template at an address; -1 if nobody answers"
    try:
        line, facts = launcher.send_request(address, {"ask": "facts"})
    except launcher.ColdStart:
        return -1
    line.close()
    return facts["pid"]


def test_a_template_that_was_killed_is_replaced(sockets):
    address = launcher.template_address(sys.executable, RULES.preload, {**os.environ, "MPLTEST": "1"})
    env = {"MPLTEST": "1"}
    launcher.start_template(sys.executable, address, RULES.preload, 30, 3, {**os.environ, **env})
    wait_for(lambda: os.path.exists(address), 120, "a template")
    line, facts = launcher.send_request(address, {"ask": "facts"})
    line.close()
    os.kill(facts["pid"], signal.SIGKILL)
    wait_for(lambda: ended(facts["pid"]), 10, "its end")
    assert "the template does not answer (Connection refused)" in start_cold(**env)
    wait_for(
        lambda: any(one["preload"] == PRELOAD and one["pid"] != facts["pid"] for one in templates()), 60, "another"
    )


NESTED = """
import os, subprocess, sys
code = '''from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(60)
client.stop_channels()
manager.shutdown_kernel()'''
env = {**os.environ, "MPLTEST": "3"}
print(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).returncode)
"""


def test_a_template_that_was_started_inside_a_kernel_outlives_it_with_the_kernels_of_others(template, monkeypatch):
    address = launcher.template_address(sys.executable, RULES.preload, {**os.environ, "MPLTEST": "3"})
    with kernel() as (_, ask):
        assert ask(NESTED, 120) == "0\n"  # as `!mlpkg run` in a notebook does
        wait_for(lambda: os.path.exists(address), 120, "the template of the inner kernel")
        monkeypatch.setenv("MPLTEST", "3")
        other = kernel()
        _, ask_other = other.__enter__()
    try:
        time.sleep(1)
        assert ask_other("print('goes on')") == "goes on\n" and pid_at(address) > 0
    finally:
        other.__exit__(None, None, None)
        os.kill(pid_at(address), signal.SIGTERM)


def test_a_kernel_that_was_there_outlives_its_template(sockets, monkeypatch):
    monkeypatch.setenv("MPLTEST", "2")
    address = launcher.template_address(sys.executable, RULES.preload)
    launcher.start_template(sys.executable, address, RULES.preload, 30, 3)
    wait_for(lambda: os.path.exists(address), 120, "a template")
    with kernel() as (_, ask):
        line, facts = launcher.send_request(address, {"ask": "facts"})
        line.close()
        os.kill(facts["pid"], signal.SIGKILL)
        wait_for(lambda: ended(facts["pid"]), 10, "its end")
        assert ask("print('goes on')") == "goes on\n"


def test_an_idle_template_ends_and_leaves_nothing(sockets):
    address = launcher.template_address(sys.executable, ["json"])
    launcher.start_template(sys.executable, address, ["json"], 1, 3)
    wait_for(lambda: os.path.exists(address), 60, "a template")
    wait_for(lambda: not os.path.exists(f"{address}.lock"), 30, "its end")
    assert not [name for name in os.listdir(Path(address).parent) if name.startswith(Path(address).name)]


def test_a_new_template_retires_older_ones(tmp_path):
    from mlpkg.steps.template import Template

    def listening(name: str, used: float) -> Path:
        path = tmp_path / name
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(path))
        os.utime(path, (used, used))
        return path

    others = [listening(f"other{number}-code", number) for number in range(5)]
    older = listening("mine-before", 9)
    template = Template(str(tmp_path / "mine-now"), 1, 1, [])
    template.listen().close()
    assert [path.exists() for path in (older, *others)] == [False, False, False, True, True, True]
    assert (tmp_path / "mine-now").is_socket()


def test_of_two_templates_that_start_at_once_one_stays(sockets):
    address = launcher.template_address(sys.executable, ["csv"])
    for _ in range(2):
        launcher.start_template(sys.executable, address, ["csv"], 20, 3)
    wait_for(lambda: os.path.exists(address), 60, "a template")
    time.sleep(1)
    found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if address in path.read_bytes().decode()]
    assert len(found) == 1
    os.kill(int(found[0].parent.name), signal.SIGTERM)


def test_a_full_process_table_gives_a_cold_start(monkeypatch, tmp_path):
    from mlpkg.steps.template import Template

    def full():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    address = f"{os.environ['XDG_RUNTIME_DIR']}/full"
    server.bind(address)
    server.listen(1)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(address)
    Template(address, 1, 1, []).take(server)
    assert "no process can be started" in launcher.read_answer(line)["refused"]
    line.close()
    server.close()


def test_a_step_logs_why_its_kernel_started_cold(sockets, caplog):
    from mlpkg.steps.kernels import StepKernel, socket_folder

    async def start_and_end() -> None:
        kernel = StepKernel("python3", socket_folder(), KernelSettings(preload=["colorsys"], idle=1))
        await kernel.start_kernel()
        await wait_for_it(kernel)
        kernel.close()

    async def wait_for_it(kernel) -> None:
        while not kernel.cold_start():
            await asyncio.sleep(0.1)

    with caplog.at_level(logging.INFO):
        asyncio.run(asyncio.wait_for(start_and_end(), 60))
    assert "A cold start of the kernel, because the template does not answer" in caplog.text


NOTEBOOK = "import os, sys; print(os.getppid(), 'pandas' in sys.modules)"


def written(path: Path) -> Path:
    cell = nbformat.v4.new_code_cell(NOTEBOOK)
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=spec), path)
    return path


def test_papermill_and_nbclient_get_warm_kernels_without_a_changed_line(template, tmp_path):
    path = written(tmp_path / "a.ipynb")
    done = papermill.execute_notebook(str(path), str(tmp_path / "b.ipynb"), progress_bar=False)
    assert "True" in done.cells[-1].outputs[-1].text
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook).execute()
    assert "True" in notebook.cells[-1].outputs[-1].text


def test_a_kernel_that_cannot_be_forked_says_why_and_starts(template):
    plain = ["echo", "/usr/bin/python3", "-m", "ipykernel_launcher"]
    command = [sys.executable, "-I", "-S", launcher.__file__, *OPTIONS, *plain]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "it has an interpreter of its own, /usr/bin/python3" in done.stderr


def test_the_kernelspec_of_this_environment_names_the_provisioner_and_can_be_undone(tmp_path, monkeypatch):
    folder = tmp_path / "share/jupyter/kernels/python3"
    folder.mkdir(parents=True)
    before = {"argv": ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "metadata": {"debugger": True}}
    (folder / "kernel.json").write_text(json.dumps(before))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    made = json.loads(install_kernelspec().read_text())
    assert made["metadata"] == {"debugger": True, "kernel_provisioner": {"provisioner_name": "mlpkg-warm"}}
    assert json.loads(install_kernelspec(warm=False).read_text()) == before
