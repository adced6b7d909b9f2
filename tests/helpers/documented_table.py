# SPDX-License-Identifier: Apache-2.0
"""A table of a page that a test measures, and holds to what it measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class DocumentedTable:
    """The lines between ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Args:
        page: the document; columns: the headings; rows: the first cell of every row.
    """

    def __init__(self, page: Path, name: str, columns: Sequence[str], rows: Sequence[str]):
        self._page, self._rows = page, list(rows)
        self._begin, self._end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        self._header = [_line(columns), f"|{'---|' * len(columns)}"]

    @contextmanager
    def measured(self) -> Iterator[dict[str, list[str]]]:
        """A place for the cells of every row, which are written with
        ``CAPO_VERL_WRITE_MATRIX=1``.
        """
        cells: dict[str, list[str]] = {}
        yield cells
        if os.environ.get("CAPO_VERL_WRITE_MATRIX"):
            assert list(cells) == self._rows, "only a run of all cases can write the table"
            lines = [*self._header, *(_line([row, *rest]) for row, rest in cells.items())]
            before, _, after = self._page.read_text().partition(self._begin)
            table = "\n".join([self._begin, *lines, self._end])
            self._page.write_text(before + table + after.partition(self._end)[2])

    def committed(self) -> dict[str, list[str]]:
        """The cells of the committed table by their row, which are the rows expected."""
        table = self._page.read_text().partition(self._begin)[2].partition(self._end)[0]
        lines = table.strip().splitlines()
        assert lines[:2] == self._header
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        assert [cells[0] for cells in rows] == self._rows
        return {cells[0]: cells[1:] for cells in rows}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
