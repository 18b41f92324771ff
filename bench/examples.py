"""The examples of a library page, against the module that it exports; nbdev-test runs the page's own cells."""

import ast
import asyncio
import importlib
import inspect
import os
import sys
from pathlib import Path

import nbformat


def main(page: Path) -> None:
    "Run the cells that are not exported; the first one that fails ends it"
    cells = [cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "code"]
    name = next(line.split()[-1] for source in cells for line in source.splitlines() if "default_exp" in line)
    module = importlib.import_module(f"mlpkg.{name}")
    sys.modules["__main__"] = module  # in a notebook, what it exports is there
    os.chdir(page.parent)
    for number, source in enumerate(cells):
        if not any(mark in source for mark in ("#| export", "#| default_exp", "#| eval: false")):
            code = compile(source, f"cell {number}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            found = eval(code, vars(module))  # noqa: S307 - what the page says
            if inspect.iscoroutine(found):
                asyncio.run(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
