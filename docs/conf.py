"""Sphinx configuration. `docs/build.py` prepares the pages and calls Sphinx; nothing is fetched from other hosts."""

import os
import re
from pathlib import Path

from docutils.utils.math.latex2mathml import tex2mathml

_root = Path(os.environ.get("MLPKG_DOCS_PROJECT", Path(__file__).parents[1]))
_version = re.search(r'__version__ = "(.+)"', (_root / "mlpkg" / "__init__.py").read_text(encoding="utf-8"))

project = "mlpkg"
author = copyright = "The mlpkg developers"
release = version = _version[1] if _version else ""
language = "en"

extensions = ["myst_nb"]
nb_execution_mode = "off"  # pages show the outputs that are stored
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_dmath_allow_digits = False
myst_dmath_allow_space = False
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # an API entry may follow the page's title directly

html_theme = "pydata_sphinx_theme"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
html_math_renderer = "mathml"
html_sidebars = {"index": [], "CHANGELOG": [], "CONTRIBUTING": []}
html_theme_options = {
    "logo": {"text": project},
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def _inline(self, node) -> None:
    self.body.append(tex2mathml(node.astext()))


def _block(self, node) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math") + tex2mathml(node.astext(), as_block=True) + "</div>")


def _skip(visit):
    "A Sphinx visitor that leaves nothing for the default one to do"
    from docutils.nodes import SkipNode

    def visitor(self, node) -> None:
        visit(self, node)
        raise SkipNode

    return visitor


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (_skip(_inline), None), (_skip(_block), None))
