"""The docs as a site: make docs.

Its source is the repository, so that links between files work here as they do on GitHub. Nothing is fetched from
elsewhere, neither when the site is built nor when it is read.
"""

from __future__ import annotations

import re
from typing import Any

project = "Potstill"
root_doc = "docs/index"
include_patterns = ["docs/**", "CHANGELOG.md", "CONTRIBUTING.md", "src/potstill/demo/teacher/README.md"]
exclude_patterns = [".*", "benchmarks", "build", "dist", "runs", "site", "tests"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

templates_path = ["templates"]
html_theme = "furo"
html_title = "Potstill"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "start.html"}
html_copy_source = False

myst_heading_anchors = 4  # by GitHub's rule

default_role = "literal"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what is returned often has a name, not a type
smartquotes = False
toc_object_entries_show_parents = "hide"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)  # before the sections are read


def _as_restructured_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: an indented paragraph is a formula, and its signs stand for themselves."""
    rewritten, formula, section = [], False, False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip():
            section = (section and indented) or bool(re.fullmatch(r"(Args|Returns|Raises|References|Yields):", line))
            if indented and not section and not formula and rewritten and not rewritten[-1].strip():
                rewritten += ["::", ""]
            formula = indented and not section
        rewritten.append(line if formula or line.lstrip().startswith(">>>") else _plain(line))
    lines[:] = rewritten


def _plain(line: str) -> str:
    """A line whose signs mean nothing to reStructuredText, but for the code between backticks."""
    parts = line.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for i, part in enumerate(parts))
