"""Write README.md from nbs/index.ipynb; with --check, fail with a diff if they differ."""

import argparse
import difflib
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from pages import relink, visible_cells

ROOT = Path(__file__).absolute().parents[1]
NOTE = "<!-- Generated from nbs/index.ipynb by `make readme`. Edit the notebook. -->\n\n"


def readme(root: Path) -> str:
    "The home page as Markdown, its links starting at the project's root"
    page = "nbs/index.ipynb"
    cells, _ = visible_cells(root / page)
    notebook = nbformat.v4.new_notebook()
    for cell in cells:
        cell.remove_directives()
        make = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
        notebook.cells.append(make(relink(cell.source, page, str) if cell.cell_type == "markdown" else cell.source))
        if cell.cell_type == "code":
            notebook.cells[-1].outputs = [nbformat.from_dict(dict(output)) for output in cell.outputs]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return NOTE + "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is out of step")
    parser.add_argument("--project", type=Path, default=ROOT, help="root of the project")
    args = parser.parse_args()
    file, wanted = args.project / "README.md", readme(args.project)
    found = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not args.check:
        file.write_text(wanted, encoding="utf-8")
    elif found != wanted:
        names = ("README.md", "README.md (from nbs/index.ipynb)")
        diff = "\n".join(difflib.unified_diff(found.splitlines(), wanted.splitlines(), *names, lineterm=""))
        raise SystemExit(f"README.md is out of step with nbs/index.ipynb. Run `make readme`.\n{diff}")


if __name__ == "__main__":
    main()
