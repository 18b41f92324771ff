"""Measuring the library notebooks: what is counted and what is refused, on small notebooks made for each figure."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PROSE = "# Rows\n\n> What the rows are."  # 5 words
START = "#| default_exp rows"
COUNT = "#| export\ndef count(rows):\n    return len(rows)"  # 2 lines
SHOWN = "count([1, 2])"
EXPORT_ALL = "#| hide\nimport nbdev\n\nnbdev.nbdev_export()"
LONG = "#| export\ndef long():\n" + "    pass\n" * 60  # 61 lines
LIMITS = "| Figure | Of | Limit |\n| --- | --- | --- |\n"


def measure(project: Path, *args: str) -> subprocess.CompletedProcess:
    "Run the script on a project"
    command = [sys.executable, str(ROOT / "docs" / "measure.py"), "--project", str(project), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def write(path: Path, *cells: str, output: str = "") -> None:
    "Write a notebook; a cell that starts with `#` and a space is prose, and the output is that of the last cell"
    path.parent.mkdir(parents=True, exist_ok=True)
    prose, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    made = [prose(text) if text.startswith("# ") else code(text) for text in cells]
    if output:
        made[-1].outputs = [nbformat.v4.new_output("stream", text=output)]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


def limit(project: Path, *rows: str) -> None:
    "Write a CONTRIBUTING.md with these limits"
    text = "# Contributing\n\n" + LIMITS + "\n".join(rows) + "\n\n## Add a step\n\n| Not | a | limit |\n"
    (project / "CONTRIBUTING.md").write_text(text)


@pytest.fixture
def project(tmp_path):
    "A project without pages, with the limits of this project"
    (tmp_path / "CONTRIBUTING.md").write_text((ROOT / "CONTRIBUTING.md").read_text())
    return tmp_path


def figure(project: Path, name: str, *cells: str, output: str = "") -> float | None:
    "A figure of a page with these cells"
    write(project / "nbs" / "api" / "10_rows.ipynb", *cells, output=output)
    done = measure(project, "--json")
    return json.loads(done.stdout)["pages"]["10_rows"][name]


@pytest.mark.parametrize("directive", ["export", "exporti", "exports", "export table"])
def test_exported_lines_leave_out_blank_lines_and_directives(project, directive):
    code = f"#| {directive}\n#| echo: false\n\nimport os\n\n\ndef here():  # Where\n    # To\n    return os.curdir\n"
    assert figure(project, "exported lines", PROSE, START, code, "here()\nhere()", EXPORT_ALL) == 4


def test_lengths_of_definition_cells(project):
    imports = "#| export\nimport os\nimport sys\nimport re\nimport json"  # defines nothing
    method = "#| exporti\n@patch\ndef add(self: Rows, row):\n\n    self.rows.append(row)"  # 3 lines
    cells = [START, imports, COUNT, COUNT, method, LONG]
    assert figure(project, "median definition cell", *cells) == 2.5
    assert figure(project, "90 % of definition cells", *cells) == 61
    assert figure(project, "90 % of definition cells", *[COUNT] * 9, LONG) == 2
    assert figure(project, "longest definition cell", *cells) == 61
    assert figure(project, "longest definition cell", START, imports) is None


def test_examples_must_be_within_three_cells(project):
    name = "definitions with an example"
    assert figure(project, name, START, COUNT, PROSE, PROSE, SHOWN) == 100
    assert figure(project, name, START, COUNT, PROSE, PROSE, PROSE, SHOWN) == 0
    assert figure(project, name, START, COUNT, "#| hide\ncount([])", COUNT, EXPORT_ALL) == 0
    assert figure(project, name, START, COUNT, "", "nbdev_export()") == 0
    assert figure(project, name, START, COUNT, COUNT, SHOWN, LONG) == pytest.approx(66.667)


def test_private_definitions_need_no_example(project):
    private = "#| export\ndef _count(rows):\n    return len(rows)"
    assert figure(project, "definitions with an example", START, private) is None
    assert figure(project, "definitions with an example", START, private + "\n\nclass Rows: ...", SHOWN) == 100


def test_documented_parameters(project):
    function = """#| export
def count(
    rows: list,  # What to count
    # Above all
    # what it is for
    unit: str = "",
    weight=None,
    *args,  # Neither wanted
    **kwargs,  # nor counted
) -> int:  # How many
    ..."""
    rows = """#| export
class Rows:
    def __init__(self, first, last=None): ...

    def _find(self, row): ...

    def find(
        self,
        row,  # Number of the row
    ): ...

class _Private:
    def find(self, row): ..."""
    method = "#| export\n@patch\ndef add(\n    self: Rows,\n    row: int,  # What to add\n): ..."
    name = "documented parameters"
    assert figure(project, name, START, function) == pytest.approx(66.667)
    assert figure(project, name, START, rows) == pytest.approx(33.333)
    assert figure(project, name, START, method) == 100
    assert figure(project, name, START, "#| export\ndef nothing(): ...") is None


def test_assertions_per_100_exported_lines(project):
    checks = """import numpy as np
test_eq(count([]), 0)
fastcore.test.test_close(1, 1)
np.testing.assert_allclose(1, 1)
for size in range(3):
    assert count([0] * size) == size
with expect_fail(TypeError):
    count(1)
with pytest.raises(TypeError):
    count(1)
test_table(5)
test_eq_by_hand = mock.assert_called()"""
    hidden = "#| hide\nassert count([1])"
    exported = "#| export\ndef check(rows):\n    assert rows"
    assert figure(project, "assertions", START, COUNT, exported, checks, hidden) == 100 * 7 / 4


def test_prose_leaves_out_code_blocks(project):
    block = (
        "# Title\n\nOne `two` - three.\n\n```python\nnot counted\n```\n\n| four | five |\n| --- | --- |\n~~~~\nno\n```"
    )
    assert figure(project, "prose", START, COUNT, block, PROSE) == (6 + 5) / 2
    assert figure(project, "prose", START, PROSE) is None


def test_hidden_cells(project):
    cells = ["#| hide\n#| default_exp rows", COUNT, SHOWN, "#| hide\nimport os", "#| export\nimport re", EXPORT_ALL, ""]
    assert figure(project, "hidden cells", PROSE, *cells) == 25


def test_stored_outputs(project):
    assert figure(project, "stored outputs", START, SHOWN) == 0
    assert figure(project, "stored outputs", START, SHOWN, output="é" * 1024) == pytest.approx(2, abs=0.1)


def test_all_pages_together_and_in_order(project):
    limit(project, "| Exported lines | each page | at most 400 lines |")
    write(project / "nbs" / "api" / "data" / "12_more.ipynb", START, LONG)
    write(project / "nbs" / "api" / "data" / "10_rows.ipynb", PROSE, START, COUNT, SHOWN)
    for skipped in ("_draft.ipynb", ".ipynb_checkpoints/10_rows.ipynb", "data/_old/10_rows.ipynb"):
        write(project / "nbs" / "api" / skipped, LONG)
    done = measure(project)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.split(r"  +", line) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines[1:]] == [
        ["data/10_rows", "2"],
        ["data/12_more", "61"],
        ["all pages together", "63"],
    ]
    assert len({len(line) for line in done.stdout.splitlines()}) == 1, "the columns are aligned"
    found = json.loads(measure(project, "--json").stdout)
    assert list(found["pages"]) == ["data/10_rows", "data/12_more"]
    assert found["all pages together"]["definitions with an example"] == 50
    assert found["exceeded"] == found["unread"] == []


def test_cells_that_are_not_python_are_named(project):
    write(project / "nbs" / "api" / "10_rows.ipynb", START, COUNT, "%time count([])", "#| export\ndef broken(:", SHOWN)
    done = measure(project, "--json")
    assert "10_rows: cell 3 is not plain Python (invalid syntax: %time count([]))" in done.stderr
    assert "10_rows: cell 4 is not plain Python" in done.stderr
    found = json.loads(done.stdout)
    assert len(found["unread"]) == 2
    assert found["pages"]["10_rows"]["exported lines"] == 3


def test_a_file_that_is_not_a_notebook_is_named(project):
    page = project / "nbs" / "api" / "10_rows.ipynb"
    write(page, START)
    page.write_text("<<<<<<< ours")
    done = measure(project)
    assert done.returncode == 1
    assert f"{page} cannot be read as a notebook" in done.stderr


def test_a_project_without_pages_fails(project):
    done = measure(project)
    assert done.returncode == 1
    assert "no notebooks below" in done.stderr


GOOD = [PROSE, START, COUNT, f"assert {SHOWN} == 2"]


@pytest.mark.parametrize(
    ("message", "cells"),
    [
        ("10_rows: exported lines 402, the limit is at most 400 lines", [COUNT] * 201),
        ("10_rows: longest definition cell 61, the limit is at most 60 lines (cell 2: long)", [PROSE, LONG]),
        ("all pages together: median definition cell 61, the limit is at most 10 lines (worst: 10_rows 61)", [LONG]),
        ("all pages together: 90 % of definition cells 61, the limit is under 25 lines (worst: 10_rows 61)", [LONG]),
        ("all pages together: definitions with an example 50, the limit is at least 85 %", [*GOOD, COUNT]),
        ("all pages together: assertions 0, the limit is at least 8 per 100 exported lines", [COUNT, SHOWN]),
        ("all pages together: prose 1.25, the limit is at least 2 words per exported line", [*GOOD, COUNT]),
        ("all pages together: hidden cells 33.33, the limit is at most 15 %", [*GOOD, "#| hide\n1"]),
    ],
)
def test_a_page_over_a_limit_fails(project, message, cells):
    write(project / "nbs" / "api" / "10_rows.ipynb", *cells)
    done = measure(project)
    assert done.returncode == 1
    line = next((line for line in done.stderr.splitlines() if message in line), None)
    assert line, done.stderr
    assert re.search(r"\. [A-Z].*\.$", line), "it says what to do"


def test_outputs_over_the_limit_fail(project):
    write(project / "nbs" / "api" / "10_rows.ipynb", *GOOD, output="x" * 31 * 1024)
    done = measure(project)
    assert done.returncode == 1
    assert "10_rows: stored outputs 31.05, the limit is at most 30 KB. Show fewer rows" in done.stderr


def test_a_page_within_all_limits_passes(project):
    write(project / "nbs" / "api" / "10_rows.ipynb", *GOOD, output="x" * 1024)
    done = measure(project)
    assert (done.returncode, done.stderr) == (0, "")


def test_limits_come_from_contributing(project):
    write(project / "nbs" / "api" / "10_rows.ipynb", *GOOD)
    limit(
        project,
        "| Exported lines | each page | at most 1 lines |",
        "| prose | each page | at least 2.6 words per exported line |",
    )
    done = measure(project)
    assert done.returncode == 1
    assert "10_rows: exported lines 2, the limit is at most 1 lines" in done.stderr
    assert "10_rows: prose 2.5, the limit is at least 2.6 words per exported line" in done.stderr
    limit(project, "| Exported lines | each page | at most 2 lines |")
    assert measure(project).returncode == 0
    write(project / "nbs" / "api" / "12_more.ipynb", *GOOD)
    limit(project, "| Exported lines | all pages together | under 4 lines |")
    done = measure(project)
    assert done.returncode == 1
    assert "all pages together: exported lines 4, the limit is under 4 lines. Move one" in done.stderr


def test_a_limit_that_is_exactly_met_holds(project):
    write(project / "nbs" / "api" / "10_rows.ipynb", *GOOD)
    limit(project, "| Prose | each page | at least 2.5 words per exported line |")
    assert measure(project).returncode == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("| Exported rows | each page | at most 400 lines |", "no figure 'Exported rows'; there are: exported lines, "),
        (
            "| Exported lines | some pages | at most 400 lines |",
            "'some pages' should be 'each page' or 'all pages togeth",
        ),
        (
            "| Exported lines | each page | at most many lines |",
            "'at most many lines' should read like 'at most 10 lines'",
        ),
        ("| Exported lines | each page | below 400 lines |", "'below 400 lines' should read like"),
        ("| Stored outputs | each page | at most 30 MB |", "'at most 30 MB' should read like 'at most 10 KB'"),
        ("| Exported lines | each page |", "'' should read like"),
        ("Exported lines | each page | at most 400", "'at most 400' should read like"),
        ("\n| Exported lines | each page | at most 400 |", "'at most 400' should read like"),
    ],
)
def test_a_limit_that_cannot_be_read_fails(project, row, message):
    write(project / "nbs" / "api" / "10_rows.ipynb", *GOOD)
    limit(project, "| Stored outputs | each page | at most 30 KB |", row)
    done = measure(project)
    assert done.returncode == 1
    assert "CONTRIBUTING.md: cannot read the limit '| " in done.stderr
    assert message in done.stderr


def test_a_missing_or_empty_table_fails(project):
    write(project / "nbs" / "api" / "10_rows.ipynb", *GOOD)
    limit(project)
    assert "the table of limits is empty" in measure(project).stderr
    (project / "CONTRIBUTING.md").write_text("# Contributing\n")
    assert "no table of limits" in measure(project).stderr


def test_every_page_of_this_project_can_be_measured():
    done = measure(ROOT, "--json")
    found = json.loads(done.stdout)
    assert found["pages"]
    assert done.returncode == bool(found["exceeded"])


NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!._]*.ipynb"))
ENDS = ("store.close()", "logging.disable(logging.NOTSET)")  # what makes a page log again
NOISE = r"\x1b\[|site-packages|/tmp/|/home/|/root/|[a-z]Warning: "


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_stored_outputs_show_nothing_of_the_machine_that_made_them(notebook):
    "No escape codes, no paths, no library warnings: a page looks the same on every machine"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [json.dumps(output, ensure_ascii=False) for cell in cells for output in cell.get("outputs", [])]
    assert [text[:200] for text in texts if re.search(NOISE, text.replace("\\u001b", "\x1b"))] == []


def test_a_page_closes_the_store_that_it_opens():
    "nbdev-test runs several pages in one process: after a store that stays open, the next page would work in it"
    code = {path: "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells) for path in NOTEBOOKS}
    made = re.compile(r"^(\w+) = (?:temporary_store|TemporaryStore)\(", re.MULTILINE)
    opened = [(path, name) for path in NOTEBOOKS for name in made.findall(code[path])]
    assert len(opened) > 10
    assert [path.name for path, name in opened if f"\n{name}.close()" not in code[path]] == []


def test_a_page_that_silences_logging_gives_it_back():
    "For the same reason: a later page that shows what is logged would see nothing; closing a store restores it too"
    code = {path: "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells) for path in NOTEBOOKS}
    silent = [path for path in NOTEBOOKS if "logging.disable(logging.WARNING)" in code[path]]
    assert len(silent) > 5
    last = {path: max(code[path].rfind(f"\n{end}") for end in ENDS) for path in silent}
    assert [path.name for path in silent if last[path] < code[path].rfind("logging.disable(logging.WARNING)")] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs" / "pipelines").rglob("*.ipynb")), ids=lambda path: path.parts[-2] + path.stem
)
def test_no_step_notebook_shows_an_empty_table(path):
    shown = [
        "".join(output.get("data", {}).get("text/plain", []))
        for cell in json.loads(path.read_text())["cells"]
        for output in cell.get("outputs", [])
    ]
    assert not [text for text in shown if text.startswith("Empty DataFrame")], "say in a sentence that there is nothing"


SILENT = [page for page in sorted((ROOT / "nbs").rglob("*.ipynb")) if '"logging.disable(' in page.read_text()]


@pytest.mark.parametrize("page", SILENT, ids=lambda page: page.stem)
def test_what_a_page_silences_is_heard_again_at_its_end(page):
    "Pages are executed one after the other in one process"
    code = [cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "code"]
    silenced = max(
        place for place, text in enumerate(code) if re.search(r"logging\.disable\((?!logging\.NOTSET)", text)
    )
    after = "\n".join(code[silenced:])
    assert "logging.disable(logging.NOTSET)" in after or "store.close()" in after
