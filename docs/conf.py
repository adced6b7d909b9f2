# SPDX-License-Identifier: Apache-2.0
"""Sphinx builds the site from these pages: ``sphinx-build -W --keep-going docs outputs/site``."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from typing import Any

from sphinx.application import Sphinx

project = "capo_verl"
author = "the capo_verl contributors"
version = release = installed_version("capo-verl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4  # GitHub's slugs, so that links work in both places
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_title = f"capo_verl {release}"
html_show_sourcelink = False
html_copy_source = False


def setup(app: Sphinx) -> None:
    app.connect("source-read", offer_files_of_the_repository)
    keep_fields_from_napoleon(app)


def offer_files_of_the_repository(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links to Markdown outside ``docs/`` lead to the file: it is no page of the site."""
    source[0] = re.sub(r"\]\((?=\.\./[^)]*\.md)([^)#]*)(#[^)]*)?\)", r"](path:\1)", source[0])


def keep_fields_from_napoleon(app: Sphinx) -> None:
    """Keep docstrings below fields as they are: Napoleon reads "Support size: how many ..." as
    "TYPE: description".
    """
    written: dict[str, list[str]] = {}

    def before(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if what == "attribute":
            written[name] = list(lines)

    def after(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = written.pop(name, lines)

    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)
