"""How Sphinx builds the site, from the pages of the repository as they are: `make docs`.

The source is the repository's root, so that a link of a page leads to the same file there and on the site.
"""

from __future__ import annotations

import re
from typing import Any

from bdh_batch import __version__, errors

project = "bdh_batch"
author = "the authors of bdh_batch"
version = release = __version__

root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "examples/README.md", "models/*/README.md", "bdh_batch/kernels/README.md"]
exclude_patterns = [".*", "build", "bdh_batch.egg-info", "**/__pycache__", "**/node_modules", "tests", "benchmarks"]
html_extra_path = ["site"]  # index.html, which leads to the first page

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!bdh_batch\.).*")]  # the standard library and openai have no pages here
html_theme = "furo"
html_title = f"bdh_batch {__version__}"
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # docstrings write `name`

TREE = "──"  # of what a docstring draws a tree with
RAISES = re.compile(r":raises (\w+)")
AFTER_NAPOLEON = 900


def prepare(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Makes reStructuredText of what docstrings write in their own way."""
    if not name.startswith("bdh_batch.client"):  # whose errors have the same names as the server's
        lines[:] = [RAISES.sub(_full_name, line) for line in lines]
    drawn = [index for index, line in enumerate(lines) if TREE in line]
    if drawn:  # a tree keeps its lines; its root stands above its branches
        first = drawn[0] - 1
        tree = [f"    {line}" for line in lines[first : drawn[-1] + 1]]
        lines[first : drawn[-1] + 1] = ["::", "", *tree, ""]


def _full_name(raised: re.Match[str]) -> str:
    return f":raises ~bdh_batch.errors.{raised[1]}" if hasattr(errors, raised[1]) else raised[0]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", prepare, AFTER_NAPOLEON)
