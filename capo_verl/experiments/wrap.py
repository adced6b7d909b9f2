# SPDX-License-Identifier: Apache-2.0
"""Prose of generated pages, in lines of 100 columns."""

from __future__ import annotations

import textwrap

COLUMNS = 100


def wrapped(page: str) -> str:
    """The Markdown page with its long lines broken, those of tables and figures aside."""
    return "\n".join(
        line
        if line.startswith(("|", "!", "#"))
        else textwrap.fill(
            line,
            COLUMNS,
            subsequent_indent="  " if line.startswith("* ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in page.split("\n")
    )
