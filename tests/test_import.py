"""`mlpkg import`: an exploratory notebook becomes functions, parameters and steps that run; nothing is overwritten."""

import io
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import Project

from mlpkg.errors import MlpkgError
from mlpkg.recipes.cutting import proposal_diff, proposed_files, write_proposal
from mlpkg.recipes.proposal import propose
from mlpkg.recipes.scaffold import find_project
from mlpkg.testing import exploratory_project, parcels


def notebook(root, *cells: str, name: str = "other.ipynb", **metadata):
    "Write an exploratory notebook; cells that begin with # are text"
    made = nbformat.v4.new_notebook(metadata=metadata)
    for text in cells:
        make = nbformat.v4.new_markdown_cell if text.startswith("#") else nbformat.v4.new_code_cell
        made.cells.append(make(text))
    nbformat.write(made, root / name)
    return root / name


@pytest.fixture(scope="module")
def imported():
    "A project in which the notebook about parcels was imported, and what was there before"
    project = Project(exploratory_project())
    parcels(1500).to_csv(project.root / "parcels.csv", index=False)
    before = {path: path.read_bytes() for path in project.root.rglob("*") if path.is_file()}
    env = {"PYTHONPATH": str(project.root)}
    said = project.mlpkg("import", "old.ipynb", "--name", "parcels", **env)
    assert {path: path.read_bytes() for path in before} == before
    assert not (project.root / "nbs").exists() and "Nothing was written" in said
    written = project.mlpkg("import", "old.ipynb", "--name", "parcels", "--write", **env)
    return project, env, said, written


def test_the_proposal_says_what_goes_where(imported):
    _, _, said, _ = imported
    for words in (
        "10_load cells 1, 2, 3, 4, passes on df", "dropped `!pip install pandas`",
        "30_train cells 7, 8, 9, 10", "Functions: near", "Parameters: longest",
        "+++ nbs/pipelines/parcels/20_clean.ipynb", '+df = lake.read("parcels/load_df")',
    ):  # fmt: skip
        assert words in said, said


def test_what_it_writes_is_clean(imported):
    project, _, _, _ = imported
    for how in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *how, "nbs", "dags"]
        done = subprocess.run(command, cwd=project.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    for path in (project.root / "nbs").rglob("*.ipynb"):
        nbformat.validate(nbformat.read(path, as_version=4))


def test_its_dag_runs_with_other_parameters(imported):
    project, env, _, _ = imported
    project.mlpkg("run", "parcels", "-p", "longest=300", **env)
    steps = project.steps(project.pipeline_runs("parcels")[0])
    assert list(steps) == ["load", "clean", "train"]
    assert 0.5 < steps["train"].data.metrics["auc"] < 1
    from mlpkg.data.lake import Lake

    lake = Lake(project.settings.lake.root)
    assert lake.read("parcels/clean_df")["distance"].max() < 300
    assert lake.count("parcels/load_df") == 1500


def test_its_notebooks_are_green_by_themselves_on_a_sample(imported):
    project, env, _, written = imported
    assert "nbs/pipelines/parcels/sample_parcels.csv" in written and "look at it before you commit it" in written
    (project.root / "parcels.csv").rename(project.root / "away.csv")
    (project.root / "pyproject.toml").write_text(
        '[tool.nbdev]\nlib_path = "team"\nnbs_path = "nbs"\nallowed_cell_metadata_keys = ["tags"]\n'
        'test_setup = "mlpkg.testing:seed"\n'
    )
    command = [str(Path(sys.executable).parent / "nbdev-test"), "--n-workers", "1"]
    done = subprocess.run(command, cwd=project.root, env=project.env | env, capture_output=True, text=True, timeout=300)
    (project.root / "away.csv").rename(project.root / "parcels.csv")
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr


def test_it_overwrites_nothing(imported):
    project, env, _, _ = imported
    before = {path: path.read_bytes() for path in project.root.rglob("*.ipynb")}
    said = project.mlpkg("import", "old.ipynb", "--name", "parcels", "--write", code=2, **env)
    assert "exist already" in " ".join(said.split())
    assert {path: path.read_bytes() for path in project.root.rglob("*.ipynb")} == before


def steps(root, *cells: str) -> list[list[int]]:
    "The cells of each step that is proposed"
    found = propose(notebook(root, *cells), "other", find_project(root))
    return [[cell.number for cell in step.cells] for step in found.steps]


LOAD = "import pandas as pd\ndf = pd.read_csv('parcels.csv')"


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        (["## A", LOAD, "## B", "df.describe()"], [[1, 2], [3, 4]]),
        (["## A", LOAD, "## B", "y = df['late']", "## C", "y.mean()"], [[1, 2], [3, 4, 5, 6]]),  # a column goes on
        (["## A", LOAD + "\nn = len(df)", "## B", "print(n)"], [[1, 2, 3, 4]]),  # a number that is computed
        (["## A", LOAD + "\nn = 3", "## B", "df.head(n)"], [[1, 2], [3, 4]]),  # a number that is given
        (
            ["## A", LOAD, "## B", "def f(t):\n    return t.dropna()\ndf = f(df)", "## C", "df.size"],
            [[1, 2], [3, 4], [5, 6]],
        ),
        ([LOAD, "df = df.dropna()", "df.size"], [[1], [2], [3]]),  # without headings, each cell
        (["## A", LOAD, "### more", "df.head()", "## B", "df.size"], [[1, 2, 3, 4], [5, 6]]),
        (
            ["## A", LOAD + "\nfor i in range(3):\n    pass", "## B", "for i in range(2):\n    df.head(i)"],
            [[1, 2], [3, 4]],
        ),
    ],
)
def test_it_is_cut_where_only_tables_go_on(cells, wanted):
    assert steps(exploratory_project(), *cells) == wanted


def test_what_a_function_takes_from_outside_keeps_it_in_its_step():
    root = exploratory_project()
    code = "limit = df['distance'].max()\ndef near(t):\n    return t[t['distance'] < limit]\nnear(df)"
    found = propose(notebook(root, "## A", LOAD, "## B", code), "other", find_project(root))
    assert not found.functions
    assert "near (cell 4) stays in its step: it takes limit from outside. Make it an argument" in found.notes


def test_cells_that_were_run_in_another_order_are_told():
    root = exploratory_project()
    found = propose(notebook(root, "df.head()", LOAD), "other", find_project(root))
    assert any("taken before anything makes them" in note and "df" in note for note in found.notes)


def test_nothing_of_the_notebook_is_executed(tmp_path):
    root = exploratory_project()
    trap = f"open({str(tmp_path / 'trap')!r}, 'w').write('x')"
    proposal_diff(propose(notebook(root, trap, f"!touch {tmp_path}/trap"), "other", find_project(root)))
    assert not (tmp_path / "trap").exists()


def test_the_path_of_a_file_is_taken_from_the_project():
    root = exploratory_project()
    (root / "looks").mkdir()
    path = notebook(root, "import pandas as pd\ndf = pd.read_csv('../parcels.csv')", name="looks/deep.ipynb")
    files = proposed_files(propose(path, "other", find_project(root)))
    text = next(text for path, text in files.items() if path.name.startswith("10_"))
    assert 'source: str = \\"parcels.csv\\"' in text and "pd.read_csv(project_path(source))" in text


def test_a_sample_is_spread_over_the_file_and_tears_no_record():
    root = exploratory_project()
    rows = [f'{n},"first line\nsecond, of {n}"\n' for n in range(5000)]
    (root / "long.csv").write_text("number,words\n" + "".join(rows))
    code = "import pandas as pd\ndf = pd.read_csv('long.csv')"
    found = propose(
        notebook(root, "## A", code, "## B", "df.size", "## C", LOAD.replace("df", "other")),
        "other",
        find_project(root),
    )
    files = {path.name: text for path, text in proposed_files(found).items()}
    sample = pd.read_csv(io.StringIO(files["sample_long.csv"]))
    assert 400 < len(sample) <= 500 and sample["number"].is_unique and sample["number"].max() > 4900
    assert (sample["words"] == "first line\nsecond, of " + sample["number"].astype(str)).all()
    assert 'source: str = \\"nbs/pipelines/other/sample_long.csv\\"' in files["10_a.ipynb"]
    assert '"source": "long.csv"' in files["other.py"]
    assert "sample_parcels.csv" not in files, "four hundred rows need no sample"
    values = eval(files["other.py"].partition("params = ")[2].partition("\nwith")[0])
    assert values == {"source": "long.csv", "source_2": "parcels.csv"}, files["other.py"]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda root: root / "none.ipynb", "there is no such file"),
        (lambda root: root / "parcels.csv", "not a notebook"),
        (lambda root: notebook(root, "# only words"), "there is no code in it"),
        (lambda root: notebook(root, "x = ("), "cell 1, line 1 is not Python"),
        (
            lambda root: notebook(root, "1", kernelspec={"name": "r", "language": "R", "display_name": "R"}),
            "a notebook for R",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_words(write, words):
    root = exploratory_project()
    with pytest.raises(MlpkgError, match=words):
        propose(write(root), "other", find_project(root))


def test_a_proposal_that_cannot_be_written_leaves_nothing(monkeypatch):
    root = exploratory_project()
    found = propose(root / "old.ipynb", "parcels", find_project(root))
    before = sorted(path for path in root.rglob("*") if path.is_file())
    from mlpkg.recipes import scaffold

    def fail(*_):
        raise scaffold.ScaffoldError("nbdev refuses")

    monkeypatch.setattr(scaffold, "_tidy", fail)
    with pytest.raises(MlpkgError, match="nothing of it stays"):
        write_proposal(found)
    left = sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".mlpkg-new.lock")
    assert left == before


def test_lines_that_are_not_clean_are_told(tmp_path):
    project = Project(exploratory_project())
    notebook(project.root, "x = 1\ntry:\n    y = x + 1\nexcept:\n    y = 0\ny", name="untidy.ipynb")
    (project.root / "pyproject.toml").write_text(
        '[tool.nbdev]\nlib_path = "team"\nnbs_path = "nbs"\n\n[tool.ruff.lint]\nselect = ["E", "F"]\n'
    )
    said = project.mlpkg("import", "untidy.ipynb", "--write", PYTHONPATH=str(project.root))
    assert "E722 Do not use bare `except`" in said and "nbs/pipelines/untidy/10_" in said, said
    assert "1 line is not clean" in said
