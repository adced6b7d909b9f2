# SPDX-License-Identifier: Apache-2.0
"""Lines of the pages have at most 100 columns, those of tables aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, ROOT


def too_long(text: str) -> list[str]:
    return [
        line for line in text.splitlines() if len(line) > 100 and not line.lstrip().startswith("|")
    ]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_columns(page: Path) -> None:
    assert too_long(page.read_text(encoding="utf-8")) == []


def test_a_long_line_is_found() -> None:
    assert too_long(f"{'x' * 101}\n| {'x' * 101} |\n{'x' * 100}") == ["x" * 101]
