"""The command line on a real project: commands run in processes of their own."""

import re
import subprocess
import sys

import mlflow
import nbformat
import pytest
from conftest import ROOT
from typer.main import get_command
from typer.testing import CliRunner

from mlpkg.cli.main import app
from mlpkg.testing import add_version, temporary_store

COMMANDS = list(get_command(app).commands)


def test_looking_back_at_a_run(project):
    project.mlpkg("run", "small", "-p", "rows=4")
    (run,) = project.pipeline_runs("small")
    short = run.info.run_id[:8]

    listed = project.look("runs")
    assert re.search(rf"{short} +small .* finished", listed)
    assert short not in project.look("runs", "--dag", "mapped")

    status = project.look("status")
    assert re.search(rf"small +{short} .* finished", status)

    printed = project.look("notebook", short, "count")
    assert "sb.glue('rows', rows)" in printed and "rows = 4" in printed

    saved = project.root / "count.ipynb"
    project.look("notebook", short, "count", "--output", str(saved))
    assert nbformat.read(saved, as_version=4).metadata.mlpkg["status"] == "FINISHED"

    wrong = project.look("notebook", short, "cuont", code=2)
    assert "no run of step 'cuont' (there are: 'count', 'report')" in " ".join(wrong.replace("│", " ").split())
    assert "no run begins with 'ffffff'" in project.look("notebook", "ffffff", "count", code=2)
    assert "0 left" in project.look("sync")


def test_doctor_on_a_healthy_project(project):
    output = project.mlpkg("doctor")
    assert not re.search(r"^no ", output, re.MULTILINE)
    assert "mapped, small, stock" in output


def test_doctor_says_what_to_do(project):
    (project.root / "dags" / "broken.py").write_text("from airflow.sdk import DAG\nimport nowhere")
    output = project.mlpkg("doctor", code=1, MLPKG_TRACKING__URI="http://127.0.0.1:9")
    assert re.search(r"^no +mlflow .*cannot be reached", output, re.MULTILINE)
    assert re.search(r"^no +airflow .*DAG files with errors", output, re.MULTILINE)
    assert "Start it, or correct tracking.uri in settings.ini" in " ".join(output.split())


def test_a_typo_in_settings_gives_a_one_line_error(project):
    file = project.root / "settings.ini"
    file.write_text(file.read_text() + "steps.cell_timout = 60\n")
    output = project.mlpkg("status", code=2)
    assert f"mlpkg: {file}, section [local], key 'steps.cell_timout': no such setting" in output
    assert "did you mean 'steps.cell_timeout'?" in output and "Traceback" not in output


def test_a_dag_with_an_error_is_named(project):
    (project.root / "dags" / "broken.py").write_text("from airflow.sdk import DAG\nimport nowhere")
    output = project.mlpkg("run", "small", code=2)
    assert "broken.py" in output and "No module named 'nowhere'" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_summary(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert command in (ROOT / "README.md").read_text(), "README names every command"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mlpkg', '--help']\n"
        "from mlpkg.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('mlflow', 'pandas', 'airflow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def commands_in(*pages: str) -> list[tuple[str, str]]:
    "Lines of shell blocks that call make or mlpkg"
    found = []
    for page in pages:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            for line in block.splitlines():
                if match := re.match(r"\$? ?((?:make|mlpkg) .*?)(?: +#.*)?$", line):
                    found.append((page, match[1]))
    return found


@pytest.mark.parametrize(("page", "command"), commands_in("README.md", "CONTRIBUTING.md"))
def test_commands_in_the_documentation_exist(page, command):
    words = command.split()
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        result = CliRunner().invoke(app, [words[1], "--help"])
        assert result.exit_code == 0, result.output
        options = [word.split("=")[0] for word in words[2:] if word.startswith("--")]
        assert all(option in result.output for option in options)


def test_status_and_history_say_that_the_champion_of_the_record_is_gone():
    with temporary_store():
        version = add_version(promoted=True)
        mlflow.MlflowClient().delete_model_version("parcels", str(version))
        for command in ("history", "status"):
            said = CliRunner().invoke(app, [command, *["--model", "parcels"][: 2 * (command == "history")]]).output
            assert "version 1 became champion at" in said and "no version serves until the next decision" in said


def test_status_shows_all_models(project):
    for number in range(105):  # MLflow gives a hundred at a time
        project.mlflow.create_registered_model(f"model {number}")
    assert project.look("status").count("no alias") == 105


@pytest.mark.parametrize("page", sorted((ROOT / "nbs" / "how-to").glob("*.ipynb")), ids=lambda page: page.stem)
def test_what_is_to_be_copied_from_a_how_to_page_is_never_wrapped(page):
    "At 80 columns, as where the output goes into a pager"
    said = CliRunner().invoke(app, ["docs", page.stem], env={"COLUMNS": "80"}).output.splitlines()
    shown = {line.strip() for line in said}
    cells = nbformat.read(page, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    blocks = [
        block
        for cell in cells
        if cell.cell_type == "markdown"
        for block in re.findall(r"```\w*\n(.*?)```", cell.source, re.S)
    ]
    wanted = [line.strip() for block in (*code, *blocks) for line in block.splitlines()]
    assert wanted and not [line for line in wanted if line not in shown]
    prose = [
        word for cell in cells if cell.cell_type == "markdown" for word in cell.source.splitlines() if len(word) > 200
    ]
    assert all(words[:150] not in "\n".join(said) for words in prose), "prose is wrapped"
