# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from capo_verl.data.datasets import markdown

DOCS = Path(__file__).parents[2] / "docs/data.md"


def test_the_table_in_the_docs_is_the_registrys():
    """To renew it: paste what ``capo-verl data --list`` prints."""
    between = (
        DOCS.read_text(encoding="utf-8")
        .split("capo-verl data --list -->\n")[1]
        .split("<!-- end -->")[0]
    )
    assert between.strip() == markdown()
