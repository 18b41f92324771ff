"""What the site and the README share: the visible part of a notebook, and links that still work."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from fastcore.nbio import NbCell, read_nb

from mlpkg.steps.notebooks import show_scraps

HIDDEN = {"hide", "default_exp"}


def visible_cells(notebook: Path) -> tuple[list[NbCell], str]:  # Cells that readers see; name of the module, or ""
    "Read a notebook without what it hides"
    nb = show_scraps(read_nb(notebook))
    module = next((cell.directives["default_exp"] for cell in nb.cells if "default_exp" in cell.directives), "")
    module = module or nb.metadata.get("nbdev", {}).get("default_exp", "")
    return [cell for cell in nb.cells if cell.source.strip() and not HIDDEN & cell.directives.keys()], module


def notebooks(nbs: Path) -> list[Path]:
    "Every notebook that is a page, in the order of their names"
    found = [path.relative_to(nbs) for path in nbs.rglob("*.ipynb")]
    return sorted(path for path in found if not any(part[0] in "._" for part in path.parts))


def title_and_summary(cells: list[NbCell]) -> tuple[str, str]:
    "The `# Title` and the `> summary` that a page starts with; empty where missing"
    text = cells[0].source if cells else ""
    title, summary = re.search(r"^# (.+)$", text, re.M), re.search(r"^> (.+)$", text, re.M)
    return title[1] if title else "", summary[1] if summary else ""


def relink(
    text: str,  # Markdown
    page: str,  # Where the text is in the project, like "nbs/index.ipynb"
    rewrite: Callable[[str], str | None],  # Project path of a link's target -> what to link to; None drops the link
) -> str:
    "Rewrite relative links; URLs, anchors and links in code are left alone"
    folder = os.path.dirname(page)

    def one(match: re.Match) -> str:
        code, label, target, anchor = match.groups()
        if code:
            return code
        new = rewrite(os.path.normpath(os.path.join(folder, target)))
        return f"[{label}]({new}{anchor or ''})" if new is not None else label

    code, link = r"(```.*?```|`[^`\n]*`(?!\]))", r"\[([^\]]*)\]\((?![a-z]+:|#|/)([^)#\s]+)(#[^)\s]*)?\)"
    return re.sub(f"{code}|{link}", one, text, flags=re.S)
