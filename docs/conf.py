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
