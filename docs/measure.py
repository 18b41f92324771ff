"""Measure the library notebooks: `python docs/measure.py` prints a table and fails if a limit is exceeded.

The limits come from the table in CONTRIBUTING.md and are written nowhere else. Notebooks are read, never run, and
the package is not imported, so a page can be measured whatever state the code is in.
"""

import argparse
import ast
import json
import math
import operator
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path

import api
from fastcore.nbio import NbCell, read_nb

ROOT = Path(__file__).absolute().parents[1]
EXPORT = {"export", "exporti", "exports"}
REACH = 3  # An example is at most this many cells below its definition
FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?(^ {0,3}\1[`~]*\s*$|\Z)", re.S | re.M)  # A code block in Markdown
CHECK = re.compile(  # Calls that count as assertions
    r"(fastcore\.test\.)?(test_(eq|eq_type|ne|is|close|shuffled|stdout|warns|fail|fig_exists)|expect_fail)"
    r"|(pytest\.)?raises|((\w+\.)*testing\.)?assert_\w+"
)


# Cells


@dataclass
class Cell:
    "A cell of a notebook, with its directives separate from its code"

    number: int  # From the top of the page, the first is 1
    kind: str  # "code", "markdown" or "raw"
    directives: set[str]
    source: str  # Without the lines of the directives
    outputs: list[dict]

    @property
    def code(self) -> bool:
        "Does it count as code? Empty cells do not, nor the one that declares the module, nor the one that exports it"
        counts = self.kind == "code" and bool(self.source.strip()) and "default_exp" not in self.directives
        return counts and not re.search(r"^(nbdev\.)?nbdev_export\(", self.source, re.M)

    @property
    def exported(self) -> bool:
        return self.code and bool(EXPORT & self.directives)

    @property
    def hidden(self) -> bool:
        return self.code and "hide" in self.directives

    @property
    def example(self) -> bool:
        return self.code and not self.exported and not self.hidden


def read_cell(number: int, cell: NbCell) -> Cell:
    "Separate the directives of a cell from its code"
    directives = set(cell.directives)
    if cell.cell_type == "code":
        cell.remove_directives()
    return Cell(number, cell.cell_type, directives, cell.source, cell.get("outputs", []))


def read_cells(notebook: Path) -> list[Cell]:
    "All cells of a page"
    try:
        return [read_cell(number, cell) for number, cell in enumerate(read_nb(notebook).cells, start=1)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SystemExit(f"{notebook} cannot be read as a notebook: {error}") from error


def library_pages(project: Path) -> dict[str, Path]:
    "The library notebooks by name: the path below nbs/api without its ending"
    folder = project / "nbs" / "api"
    found = {path.relative_to(folder).with_suffix(""): path for path in folder.rglob("*.ipynb")}
    return {name.as_posix(): found[name] for name in sorted(found) if not any(part[0] in "._" for part in name.parts)}


# Counting


@dataclass
class Definition:
    "An exported cell that defines functions or classes at top level"

    lines: int
    names: list[str]
    cell: int  # Number of the cell
    example: bool  # Is there an example in the cells below?

    @property
    def public(self) -> bool:
        return any(name[0] != "_" for name in self.names)


@dataclass
class Counts:
    "What was counted in a cell, in a page, or in all pages together"

    lines: int = 0  # Of exported code, without blank lines and directives
    definitions: list[Definition] = field(default_factory=list)
    parameters: int = 0  # Of public functions and methods
    described: int = 0  # Parameters that have a comment
    assertions: int = 0
    words: int = 0  # Of prose
    cells: int = 0  # Of code
    hidden: int = 0  # Cells of code that readers do not see
    output: int = 0  # Bytes of stored outputs
    unread: list[str] = field(default_factory=list)  # Cells that are not plain Python

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def count_page(notebook: Path) -> Counts:
    "What a page holds"
    cells = read_cells(notebook)
    return sum((count_cell(cell, cells[cell.number : cell.number + REACH]) for cell in cells), Counts())


def count_cell(
    cell: Cell,
    below: list[Cell],  # The cells to search for an example
) -> Counts:
    "What a cell adds to its page"
    if cell.kind == "markdown":
        return Counts(words=len(re.findall(r"\S*\w\S*", FENCE.sub("", cell.source))))
    counts = Counts(output=sum(len(json.dumps(out, ensure_ascii=False).encode()) for out in cell.outputs))
    if not cell.code:
        return counts
    counts += Counts(cells=1, hidden=int(cell.hidden), lines=code_lines(cell.source) if cell.exported else 0)
    try:
        tree = ast.parse(cell.source)
    except (SyntaxError, ValueError) as error:
        return counts + Counts(unread=[f"cell {cell.number} is not plain Python ({reason(error)})"])
    return counts + (count_exported(cell, tree, below) if cell.exported else Counts(assertions=assertions(tree)))


def count_exported(cell: Cell, tree: ast.Module, below: list[Cell]) -> Counts:
    "Definitions and parameters of an exported cell"
    counts = Counts()
    if names := [node.name for node in tree.body if isinstance(node, api.Definition)]:
        example = any(other.example for other in below)
        counts.definitions = [Definition(code_lines(cell.source), names, cell.number, example)]
    functions = list(public_functions(tree))
    for function, described in zip(functions, api.described(functions, cell.source), strict=True):
        wanted = parameters(function)
        counts.parameters += len(wanted)
        counts.described += len(wanted & described)
    return counts


def code_lines(source: str) -> int:
    "Lines that are not blank"
    return sum(bool(line.strip()) for line in source.splitlines())


def reason(error: Exception) -> str:
    "What Python's parser said, and about which line"
    line = (error.text or "").strip() if isinstance(error, SyntaxError) else ""
    return f"{error.msg}: {line}" if isinstance(error, SyntaxError) and line else str(error)


def public_functions(tree: ast.Module) -> Iterator[api.Function]:
    "The functions and methods that a reader may call; `__init__` is how a class is called"
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) and node.name[0] != "_" else [node]
        for function in inside:
            if isinstance(function, api.Function) and (function.name[0] != "_" or function.name == "__init__"):
                yield function


def parameters(function: api.Function) -> set[str]:
    "Names of the parameters that need a description"
    args = function.args
    return {arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)} - {"self", "cls"}


def assertions(tree: ast.Module) -> int:
    "Assert statements and calls that assert"
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    asserts = sum(isinstance(node, ast.Assert) for node in ast.walk(tree))
    return asserts + sum(bool(CHECK.fullmatch(call)) for call in calls)


# Figures


@dataclass(frozen=True)
class Figure:
    "A figure of a page: how it is worked out, and what to do if it exceeds its limit"

    column: str  # Heading in the printed table
    unit: str  # As limits write it
    digits: int  # After the decimal point, in the printed table
    of: Callable[[Counts], float | None]  # None where the page has nothing to measure
    advice: str


def ratio(part: float, whole: float, times: float = 1) -> float | None:
    "A part of a whole; None if the whole is zero"
    return part * times / whole if whole else None


def lengths(counts: Counts) -> list[int]:
    "Lines of each definition cell, shortest first"
    return sorted(definition.lines for definition in counts.definitions)


def median(counts: Counts) -> float | None:
    "Median length of the definition cells"
    return statistics.median(lengths(counts)) if counts.definitions else None


def nine_tenths(counts: Counts) -> int | None:
    "90 % of the definition cells have at most this many lines"
    found = lengths(counts)
    return found[math.ceil(0.9 * len(found)) - 1] if found else None


def with_example(counts: Counts) -> float | None:
    "Percentage of the public definition cells that are followed by an example"
    public = [definition for definition in counts.definitions if definition.public]
    return ratio(sum(definition.example for definition in public), len(public), 100)


_SPLIT = "Give each definition a cell of its own, and let a class grow method by method with @patch."
FIGURES = {  # By the name that the table in CONTRIBUTING.md uses, in lower case
    "exported lines": Figure(
        "lines", "lines", 0, lambda c: c.lines,
        "Move one of its subjects to a notebook of its own.",
    ),
    "median definition cell": Figure("median", "lines", 1, median, _SPLIT),
    "90 % of definition cells": Figure("90 %", "lines", 0, nine_tenths, _SPLIT),
    "longest definition cell": Figure("longest", "lines", 0, lambda c: max(lengths(c), default=None), _SPLIT),
    "definitions with an example": Figure(
        "examples %", "%", 0, with_example,
        f"Show each definition at work in a visible cell, at most {REACH} cells below it.",
    ),
    "documented parameters": Figure(
        "documented %", "%", 0, lambda c: ratio(c.described, c.parameters, 100),
        "Describe each parameter in a comment at the end of its line.",
    ),
    "assertions": Figure(
        "assertions", "per 100 exported lines", 1, lambda c: ratio(c.assertions, c.lines, 100),
        "End examples in an assertion: assert, test_eq, or expect_fail for an error.",
    ),
    "prose": Figure(
        "words", "words per exported line", 1, lambda c: ratio(c.words, c.lines),
        "Say below each definition why it is so, what it costs or where it fails.",
    ),
    "hidden cells": Figure(
        "hidden %", "%", 0, lambda c: ratio(c.hidden, c.cells, 100),
        "Hide set-up only: show a test as an example, or move it to tests/.",
    ),
    "stored outputs": Figure(
        "outputs KB", "KB", 1, lambda c: c.output / 1024,
        "Show fewer rows, and smaller plots with fewer points.",
    ),
}  # fmt: skip


# Limits

EACH, ALL = "each page", "all pages together"
HEADER = ["Figure", "Of", "Limit"]
HOLDS = {"at most": operator.le, "under": operator.lt, "at least": operator.ge}


@dataclass(frozen=True)
class Limit:
    "A row of the table in CONTRIBUTING.md"

    figure: str
    scope: str  # EACH or ALL
    kind: str  # One of HOLDS
    bound: float

    def holds(self, value: float | None) -> bool:
        "Is a value within the limit? Yes if there is nothing to measure"
        return value is None or HOLDS[self.kind](value, self.bound)

    def text(self, value: float) -> str:
        "How a value compares with the limit"
        bound = f"{self.kind} {number(self.bound)} {FIGURES[self.figure].unit}"
        return f"{self.figure} {number(value)}, the limit is {bound}"


def number(value: float) -> str:
    "A number with at most two digits after the decimal point"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def read_limits(page: Path) -> list[Limit]:
    "The limits in the table of CONTRIBUTING.md"
    rows = iter([split_row(line) for line in page.read_text(encoding="utf-8").splitlines()])
    if not any(row[:3] == HEADER for row in rows):
        raise SystemExit(f"{page.name}: no table of limits; it should begin with the columns {', '.join(HEADER)}")
    section = takewhile(lambda row: row[0][:1] != "#", rows)
    found = [row for row in section if len(row) > 1 and not all(re.fullmatch(":?-+:?", cell) for cell in row)]
    if not found:
        raise SystemExit(f"{page.name}: the table of limits is empty")
    return [read_limit(row, page.name) for row in found]


def split_row(line: str) -> list[str]:
    "The cells of a table's row"
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read_limit(row: list[str], page: str) -> Limit:
    "A limit from its row"
    figure, scope, limit = (*row, "", "")[:3]
    match = re.fullmatch(rf"({'|'.join(HOLDS)}) (\d+(?:\.\d+)?) (.+)", limit)
    if figure.lower() not in FIGURES:
        wrong = f"no figure {figure!r}; there are: {', '.join(FIGURES)}"
    elif scope not in (EACH, ALL):
        wrong = f"{scope!r} should be {EACH!r} or {ALL!r}"
    elif not match or match[3] != FIGURES[figure.lower()].unit:
        wrong = f"{limit!r} should read like 'at most 10 {FIGURES[figure.lower()].unit}' ({', '.join(HOLDS)})"
    else:
        return Limit(figure.lower(), scope, match[1], float(match[2]))
    raise SystemExit(f"{page}: cannot read the limit '| {' | '.join(row)} |': {wrong}")


def exceeded(pages: dict[str, Counts], limits: list[Limit]) -> list[str]:
    "A line for each limit that is exceeded: where, by how much, what to do"
    found = []
    for limit in limits:
        figure = FIGURES[limit.figure]
        measured = pages if limit.scope == EACH else {ALL: sum(pages.values(), Counts())}
        for name, counts in measured.items():
            value = figure.of(counts)
            if not limit.holds(value):
                places = cells_over(limit, counts) if limit.scope == EACH else pages_over(limit, pages)
                found.append(f"{name}: {limit.text(value)}{places}. {figure.advice}")
    return found


def cells_over(limit: Limit, counts: Counts) -> str:
    "The definition cells that are too long, in brackets; empty for another limit"
    if limit.figure != "longest definition cell":
        return ""
    long = [definition for definition in counts.definitions if not limit.holds(definition.lines)]
    found = [f"cell {definition.cell}: {', '.join(definition.names)}" for definition in long]
    return f" ({'; '.join(found)})"


def pages_over(limit: Limit, pages: dict[str, Counts]) -> str:
    "The three pages that are farthest over a limit of all pages, in brackets; empty if no page alone is over it"
    figure = FIGURES[limit.figure]
    values = {name: value for name, counts in pages.items() if not limit.holds(value := figure.of(counts))}
    worst = sorted(values, key=values.__getitem__, reverse=limit.kind != "at least")[:3]
    return f" (worst: {', '.join(f'{name} {number(values[name])}' for name in worst)})" if worst else ""


# What is printed


def table(pages: dict[str, Counts]) -> str:
    "A line for each page and one for all, in aligned columns"
    rows = [["page", *(figure.column for figure in FIGURES.values())]]
    for name, counts in [*pages.items(), (ALL, sum(pages.values(), Counts()))]:
        rows.append([name, *(written(figure, counts) for figure in FIGURES.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def written(figure: Figure, counts: Counts) -> str:
    "A figure as the table prints it; a dash if there is nothing to measure"
    value = figure.of(counts)
    return "-" if value is None else f"{value:.{figure.digits}f}"


def as_json(pages: dict[str, Counts], over: list[str], unread: list[str]) -> str:
    "The same figures for programs"
    found = {"pages": {name: figures(counts) for name, counts in pages.items()}}
    total = figures(sum(pages.values(), Counts()))
    return json.dumps({**found, ALL: total, "exceeded": over, "unread": unread}, indent=2)


def figures(counts: Counts) -> dict[str, float | None]:
    "All figures by name"
    values = {name: figure.of(counts) for name, figure in FIGURES.items()}
    return {name: value if value is None else round(value, 3) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--project", type=Path, default=ROOT, help="root of the project")
    args = parser.parse_args()
    limits = read_limits(args.project / "CONTRIBUTING.md")
    pages = {name: count_page(path) for name, path in library_pages(args.project).items()}
    if not pages:
        raise SystemExit(f"no notebooks below {args.project / 'nbs' / 'api'}")
    over = exceeded(pages, limits)
    unread = [f"{name}: {text}" for name, counts in pages.items() for text in counts.unread]
    print(as_json(pages, over, unread) if args.json else table(pages), flush=True)
    if unread:
        print("\nDefinitions and assertions in these cells are not counted:", *unread, sep="\n", file=sys.stderr)
    if over:
        raise SystemExit("\n".join(["\nOver the limits of CONTRIBUTING.md:", *over]))


if __name__ == "__main__":
    main()
