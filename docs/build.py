"""Build the documentation site from the notebooks: `python docs/build.py` writes _docs/.

The pages are notebooks with the outputs they store; nothing is executed. A warning of Sphinx, a link that leads nowhere
and a script or style from another host each fail the build, and the previous _docs/ stays as it was.
"""

import argparse
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api
from bs4 import BeautifulSoup
from fastcore.nbio import NbCell, mk_cell, read_nb, write_nb
from pages import notebooks, relink, title_and_summary, visible_cells
from sphinx.cmd.build import main as sphinx_build

DOCS = Path(__file__).absolute().parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages at the root of the project
SECTIONS = {  # folder in nbs/ -> title and first line of its page, in the order of the navigation
    "tutorials": ("Tutorials", "Walks through the project, from start to finish."),
    "how-to": ("How-to", "Single tasks, step by step."),
    "pipelines": ("Pipeline", "The steps in the order in which they run. Each page is the notebook that runs."),
    "api": ("Library", "The notebooks that `mlpkg` is exported from: documentation, source and tests in one."),
}


LAYERS = {  # folder in nbs/api/ -> title and first line of its page
    "data": ("Data", "Tables, what they must look like, and every way to read and write them."),
    "steps": ("Steps", "A step notebook: checked, executed, recorded."),
    "models": ("Models", "Fitting models, scoring rows, judging scores, and the registry."),
    "batch": ("Batch", "Predictions for a table or a file of any size."),
    "monitoring": ("Monitoring", "Whether the world has moved away from a model, and when to train again."),
    "serving": ("Serving", "Predictions over HTTP, the answers that were given, and the truth about them."),
    "recipes": ("Recipes", "What a pipeline for any table has to know, and what writes a new one."),
    "airflow": ("Airflow", "Step notebooks as tasks, and DAG files that also run in one process."),
    "cli": ("Command line", "What `mlpkg` does when you type it."),
    "examples": ("Examples", "Flights and diamonds: no other module knows about them."),
}


def layer_order(project: Path) -> list[str]:
    "Names of the layers, the lowest first, as pyproject.toml has them"
    file = project / "pyproject.toml"
    config = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    contracts = config.get("tool", {}).get("importlinter", {}).get("contracts", [])
    layers = next((contract["layers"] for contract in contracts if contract["type"] == "layers"), [])
    return [layer.strip("()").removeprefix("mlpkg.") for layer in reversed(layers)]


class Site:
    "The pages of a project, prepared in `source` for Sphinx"

    def __init__(self, project: Path, source: Path):
        self.project, self.source = project, source
        self.nbs = project / "nbs"
        self.pages = notebooks(self.nbs)
        self.cells = {page: visible_cells(self.nbs / page) for page in self.pages}
        self.symbols = self._symbols()

    def _symbols(self) -> dict[str, str]:
        "Link target by each way to write a symbol: `open_lake`, `lake.open_lake`, `mlpkg.data.lake.open_lake`"
        found: dict[str, str] = {}
        ambiguous = set()
        for cells, module in self.cells.values():
            for cell in cells:
                for name in api.names(cell.source) if _exported(cell) else ():
                    target = f"mlpkg.{module}.{name}"
                    ambiguous |= {name} & found.keys()
                    found |= {name: target, f"{module}.{name}": target, target: target}
        return {name: target for name, target in found.items() if name not in ambiguous}

    def prepare(self) -> None:
        "Write every page into `source`"
        for page in self.pages:
            self._write_notebook(page)
        for name in PAGES:
            if (self.project / name).is_file():
                text = (self.project / name).read_text(encoding="utf-8")
                (self.source / name).write_text(self._markdown(text, name), encoding="utf-8")
        for image in (path for path in self.nbs.rglob("*") if path.suffix in (".png", ".svg", ".jpg")):
            target = self.source / image.relative_to(self.nbs)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
        for folder in self.sections():
            self._write_section(folder)

    def sections(self) -> list[Path]:
        "Folders of notebooks, in the order of the navigation"
        top, layers = list(SECTIONS), layer_order(self.project)
        folders = {page.parent for page in self.pages} - {Path(".")}

        def place(folder: Path) -> tuple:
            return _index(top, folder.parts[0]), len(folder.parts), _index(layers, folder.name), folder

        return sorted(folders, key=place)

    def _write_notebook(self, page: Path) -> None:
        cells, module = self.cells[page]
        nb = read_nb(self.nbs / page)
        nb.cells = [new for cell in cells for new in self._cell(cell, page, module)]
        if page == Path("index.ipynb"):
            nb.cells.append(mk_cell(self._home_toctree(), "markdown"))
        nb.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}  # nbdev-clean drops it
        target = self.source / page
        target.parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, target)

    def _cell(self, cell: NbCell, page: Path, module: str) -> list[NbCell]:
        "What becomes of one cell; an exported one turns into its reference, with the source folded below"
        if cell.cell_type == "markdown":
            cell.source = self._markdown(cell.source, f"nbs/{page}", module)
        if cell.cell_type != "code":
            return [cell]
        directives = dict(cell.directives)
        cell.remove_directives()
        tags = cell.metadata.setdefault("tags", [])
        if directives.get("echo") == "false":
            tags.append("remove-input")
        if not _EXPORT & directives.keys():
            return [cell]
        if _only_imports(cell.source):
            return []
        tags.append("hide-input")
        text = api.render(cell.source, f"mlpkg.{module}")
        return [mk_cell(self._linked(text, module), "markdown"), cell] if text else [cell]

    def _markdown(self, text: str, page: str, module: str = "") -> str:
        "Markdown of a page with links that lead to pages of the site"
        folder = os.path.dirname(page.removeprefix("nbs/"))

        def rewrite(target: str) -> str | None:
            path = self.project / target
            site = target.removeprefix("nbs/")
            if path.is_dir():
                if Path(site) not in self.sections():
                    return None
                site += "/index.md"
            elif path.is_file() and not target.startswith("nbs/") and target not in PAGES:
                site = f"_files/{target}"
                (self.source / site).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.source / site)
            return os.path.relpath(site, folder or ".")

        return self._linked(relink(text, page, rewrite), module)

    def _linked(self, text: str, module: str) -> str:
        "Names of the library in backticks become links to their reference, on this page if there are several"

        def one(match: re.Match) -> str:
            name = match["name"] or ""
            target = self.symbols.get(f"{module}.{name}") or self.symbols.get(name)
            # A mere word, such as a column `age`, means a function only among the pages of that function's layer.
            word = name.isalpha() and name.islower() and not match[0].endswith("()`")
            if not target or (word and not target.startswith(f"mlpkg.{module.partition('.')[0]}.")):
                return match[0]
            return f"[{match[0]}](#{target})"

        skip = r"```.*?```|^#.*?$|^\(.*?\)=$|\[[^\]]*\]\([^)]*\)|``.*?``"
        return re.sub(rf"{skip}|`(?P<name>[A-Za-z_][\w.]*)(\(\))?`", one, text, flags=re.S | re.M)

    def _write_section(self, folder: Path) -> None:
        "The page of a folder: title, what it holds, links in number order"
        pages = [page for page in self.pages if page.parent == folder]
        if folder / "index.ipynb" in pages:
            return
        title, first = self._section_title(folder)
        lines = [f"# {title}", "", first, "", "| Page | What it is about |", "| --- | --- |"]
        for page in pages:
            name, summary = title_and_summary(self.cells[page][0])
            lines.append(f"| [{name or page.stem}]({page.name}) | {summary.replace('|', chr(92) + '|')} |")
        below = [other for other in self.sections() if other.parent == folder]
        for other in below:
            name, summary = self._section_title(other)
            lines.append(f"| [{name}]({other.name}/index.md) | {summary} |")
        lines += ["", *_toctree([*(page.stem for page in pages), *(f"{other.name}/index" for other in below)])]
        text = "\n".join(lines)
        (self.source / folder / "index.md").write_text(text, encoding="utf-8")

    def _section_title(self, folder: Path) -> tuple[str, str]:
        "Title and first line of a folder's page"
        if folder.parts[0] == "api" and folder.name in LAYERS:
            return LAYERS[folder.name]
        title, first = SECTIONS.get(folder.parts[0], (folder.name.capitalize(), ""))
        return (f"{title}: {folder.name}" if len(folder.parts) > 1 else title), first

    def _home_toctree(self) -> str:
        sections = self.sections()
        entries = [f"{folder.as_posix()}/index" for folder in sections if folder.parent not in sections]
        entries += [Path(name).stem for name in PAGES if (self.project / name).is_file()]
        entries += [page.stem for page in self.pages if page.parent == Path(".") and page.stem != "index"]
        return "\n".join(_toctree(entries))


_EXPORT = {"export", "exports", "exporti", "exec_doc"}


def _index(order: list[str], name: str) -> int:
    "Position in an order; names that are not in it come last"
    return order.index(name) if name in order else len(order)


def _exported(cell: NbCell) -> bool:
    return cell.cell_type == "code" and bool(_EXPORT & cell.directives.keys())


def _only_imports(source: str) -> bool:
    return all(isinstance(node, api.ast.Import | api.ast.ImportFrom) for node in api.ast.parse(source).body)


def _toctree(entries: list[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", ":maxdepth: 2", "", *entries, "```"]


def faults(site: Path) -> list[str]:
    "Links that lead nowhere, and what a page would load from another host"
    pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]  # the theme keeps templates there
    soups = {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in pages}
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in soups.items()}
    found = []
    for page, soup in soups.items():
        where = page.relative_to(site).as_posix()
        for tag in soup.find_all(["a", "img", "link", "script"]):
            url = urlsplit(str(tag.get("href") or tag.get("src") or ""))
            if url.scheme or url.netloc:
                if tag.name != "a" and url.scheme != "data":
                    found.append(f"{where}: loads {url.geturl()} from another host")
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{where}: links to a missing page, {url.geturl()}")
            elif url.fragment and target in anchors and unquote(url.fragment) not in anchors[target]:
                found.append(f"{where}: links to a missing anchor, {url.geturl()}")
    return sorted(set(found))


def build(project: Path, out: Path, work: Path) -> None:
    "Prepare, build and check in `work`; only a site without faults replaces `out`"
    shutil.rmtree(work, ignore_errors=True)
    source, site = work / "source", work / "site"
    source.mkdir(parents=True)
    Site(project, source).prepare()
    os.environ["MLPKG_DOCS_PROJECT"] = str(project)
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(DOCS), "-d", str(work / "doctrees")]
    if sphinx_build([*options, str(source), str(site)]):
        raise SystemExit("the site was not built: see the warnings above; the pages are the notebooks in nbs/")
    if wrong := faults(site):
        raise SystemExit("the site was not built:\n" + "\n".join(wrong))
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=DOCS.parent, help="root of the project")
    parser.add_argument("--out", type=Path, help="folder of the site; _docs/ in the project unless given")
    parser.add_argument("--work", type=Path, help="folder for pages being built; _proc/ in the project unless given")
    args = parser.parse_args()
    project = args.project.absolute()
    build(project, (args.out or project / "_docs").absolute(), (args.work or project / "_proc").absolute())
    print(f"site: {args.out or project / '_docs'}", file=sys.stderr)


if __name__ == "__main__":
    main()
