# SPDX-License-Identifier: Apache-2.0
"""Pages of which a part is generated."""

from pathlib import Path

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def renewed(page: Path, text: str) -> str:
    """The page with ``text`` between its markers."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"
