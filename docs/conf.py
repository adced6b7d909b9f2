# SPDX-License-Identifier: Apache-2.0
"""Sphinx builds the site from these pages: ``sphinx-build -W --keep-going docs outputs/site``."""

from importlib.metadata import version as installed_version

project = "capo_verl"
author = "the capo_verl contributors"
version = release = installed_version("capo-verl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["evidence/*.md"]
myst_heading_anchors = 4  # GitHub's slugs, so that links work in both places
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_title = f"capo_verl {release}"
html_show_sourcelink = False
html_copy_source = False


def setup(app):
    """Keep Napoleon away from fields: it reads "Support size: how many ..." below one as "TYPE:
    description".
    """
    written = {}

    def before(app, what, name, obj, options, lines):
        if what == "attribute":
            written[name] = list(lines)

    def after(app, what, name, obj, options, lines):
        lines[:] = written.pop(name, lines)

    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)
