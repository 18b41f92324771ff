"""The documentation site and README.md as they come out of the notebooks: a build takes too long for a page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    path.relative_to(ROOT / "nbs")
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in path.relative_to(ROOT / "nbs").parts)
)


def script(name: str, *args: object) -> subprocess.CompletedProcess:
    "Run one of the scripts in docs/"
    command = [sys.executable, str(ROOT / "docs" / name), *map(str, args)]
    env = {**os.environ, "MLPKG_TEST_SECRET": "must-not-be-published"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)  # noqa: S603


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site of this project, built in a folder of its own"
    folder = tmp_path_factory.mktemp("docs")
    done = script("build.py", "--out", folder / "site", "--work", folder / "work")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture
def project(tmp_path):
    "A project of two pages: a home page and one library notebook"
    (tmp_path / "mlpkg").mkdir()
    (tmp_path / "mlpkg" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    write(tmp_path / "nbs" / "index.ipynb", "# Home\n\nSee [the table](api/10_table.ipynb#rows).")
    page = ["# Table\n\n> Rows.", "#| default_exp table", "## Rows\n\nUse `count`.", CODE, "#| hide\nsecret_setup = 1"]
    write(tmp_path / "nbs" / "api" / "10_table.ipynb", *page)
    return tmp_path


CODE = """#| export
def count(
    rows: list[str] | None = None,  # What to count
    # Where to look,
    # all of it unless given
    env=os.environ,
) -> int:  # How many
    'Count rows'
    return len(rows)"""


def write(path: Path, *cells: str) -> None:
    "Write a notebook; a cell that starts with `#` and a space is prose"
    path.parent.mkdir(parents=True, exist_ok=True)
    prose, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    made = [code(text) if text.startswith("#|") or text[0] != "#" else prose(text) for text in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


def build(project: Path) -> subprocess.CompletedProcess:
    return script("build.py", "--project", project, "--out", project / "site", "--work", project / "work")


def built_page(project: Path, name: str) -> BeautifulSoup:
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    return BeautifulSoup((project / "site" / "api" / f"{name}.html").read_text(), "html.parser")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_every_notebook_has_its_page(site, notebook):
    page = site / notebook.with_suffix(".html")
    assert page.is_file()
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert soup.h1 is not None, f"{notebook}: no title; start it with '# Title'"


def test_every_module_is_described(site):
    pages = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "mlpkg").rglob("[!_]*.py")]
    modules = ["-".join(path.parts).replace("_", "-") for path in paths]
    assert [name for name in modules if f'id="{name}-' not in pages] == []


def test_search_index_and_no_secrets(site):
    assert "load_settings" in (site / "searchindex.js").read_text()
    for page in site.rglob("*.html"):
        assert "must-not-be-published" not in page.read_text()


def test_methods_patched_into_a_class_are_shown_as_its_methods(project):
    write(
        project / "nbs" / "api" / "11_box.ipynb",
        "# Box\n\n> A box.",
        "#| default_exp box",
        BOX,
        SIZE,
        "## Use\n\nSee `Box.fill`.",
    )
    soup = built_page(project, "11_box")
    text = " ".join(soup.article.get_text().split())
    assert "Box.fill(rows: int) -> int" in text
    assert "@property Box.size -> int" in text
    assert "patch" not in soup.find(id="mlpkg-box-box-fill").get_text()
    assert soup.find("a", href="#mlpkg-box-box-fill", string="Box.fill")


BOX = """#| export
class Box:
    'A box'"""
SIZE = """#| export
@patch
def fill(
    self: Box,
    rows: int,  # How many
) -> int:  # What is in it
    'Put rows in'
    return rows


@patch(as_prop=True)
def size(self: Box) -> int:
    'Room'
    return 3"""


def test_page_of_a_library_notebook(project):
    soup = built_page(project, "10_table")
    text = " ".join(soup.article.get_text().split())
    assert "count(rows: list[str] | None = None, env=os.environ) -> int" in text
    assert "rows What to count env Where to look, all of it unless given" in text
    assert "Returns: How many" in text
    assert soup.find("a", href="#mlpkg-table-count", string="count"), "a name in backticks leads to its reference"
    assert "secret_setup" not in text


def test_a_word_that_is_also_a_function_is_a_link_only_in_its_layer(project):
    write(project / "nbs" / "index.ipynb", "# Home\n\nA column `count`, and the function `count()`.")
    built_page(project, "10_table")
    soup = BeautifulSoup((project / "site" / "index.html").read_text(), "html.parser")
    assert [link.get_text() for link in soup.article.find_all("a") if "count" in link.get_text()] == ["count()"]


def test_a_broken_link_fails_the_build_and_keeps_the_site(project):
    assert build(project).returncode == 0
    write(project / "nbs" / "index.ipynb", "# Home\n\nSee [a](api/11_table.ipynb) and [b](api/10_table.ipynb#colums).")
    done = build(project)
    assert done.returncode != 0
    assert "api/11_table.ipynb" in done.stderr
    assert "colums" in done.stderr
    assert (project / "site" / "index.html").is_file()


def test_a_script_from_another_host_fails_the_build(project):
    write(project / "nbs" / "index.ipynb", '# Home\n\n<script src="https://cdn.example.org/x.js"></script>')
    done = build(project)
    assert done.returncode != 0
    assert "index.html: loads https://cdn.example.org/x.js from another host" in done.stderr


def test_readme_is_the_home_page():
    done = script("readme.py", "--check")
    assert done.returncode == 0, done.stderr


def test_readme_links_start_at_the_root(project):
    assert script("readme.py", "--project", project).returncode == 0
    text = (project / "README.md").read_text()
    assert "[the table](nbs/api/10_table.ipynb#rows)" in text
    assert script("readme.py", "--project", project, "--check").returncode == 0
    (project / "README.md").write_text(text.replace("Home", "House"))
    done = script("readme.py", "--project", project, "--check")
    assert done.returncode != 0
    assert "+# Home" in done.stderr
    assert "make readme" in done.stderr


def test_every_relative_link_of_the_readme_exists():
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
