# SPDX-License-Identifier: Apache-2.0
"""verl's ``file`` logger: one JSON object ``{"step": …, "data": {…}}`` a line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capo_verl.viewer.notes import Damaged, DamagedLines, reason
from capo_verl.viewer.series import Series, collect, step_number

KEYS = tuple(re.compile(rb'"%b"\s*:' % key) for key in (b"step", b"data"))
LOOKED_AT, LONGEST = 100, 1 << 20
"""Lines, and bytes of each, that tell whether a file is a log: its first line may be damaged."""


class Entry(NamedTuple):
    """One line."""

    step: int
    """0 is the validation before training."""
    data: dict[str, Any]
    """Metric -> value; verl writes NaN and infinity as null."""


class FileLog:
    """A log that may still grow.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = 0

    def new_entries(self, damaged: Damaged | None = None) -> list[Entry]:
        """Entries that were completed since the last call; a line still being written is left for
        the next.

        Args:
            damaged: called for each line that is not verl's, which is left out.

        Raises:
            ValueError: naming the line that is not verl's, without ``damaged``.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                *complete, rest = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for number, line in enumerate(complete, start=self._lines + 1):
            if not line.strip():
                continue
            try:
                found.append(parse(line))
            except ValueError as e:
                if damaged is None:
                    raise ValueError(
                        f"{self._path}, line {number}: {e}; remove the line, or give another file"
                    ) from e
                damaged(number, str(e))
        self._offset += sum(len(line) + 1 for line in complete)
        self._lines += len(complete)
        if is_entry(rest):  # no part of a JSON object is one
            self._offset += len(rest)
            found.append(parse(rest))
        return found


def parse(line: str | bytes) -> Entry:
    """
    Raises:
        ValueError: if the line is not one of verl's.
    """
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("data"), dict):
            raise ValueError("no object with step and data")
        return Entry(step_number(entry.get("step")), entry["data"])
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not a line of verl's file logger ({reason(e)})") from e


def is_entry(line: bytes) -> bool:
    """True if a line is one of verl's."""
    try:
        parse(line)
    except ValueError:
        return False
    return True


def is_file_log(path: Path) -> bool:
    """True if one of the first lines has the keys of verl's, be it damaged or not."""
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        lines = (file.readline(LONGEST) for _ in range(LOOKED_AT))
        return any(all(key.search(line) for key in KEYS) for line in lines)


def read_file_logs(paths: list[Path], notes: list[str]) -> dict[str, Series]:
    """All metrics of a run's logs, one per start. Where steps repeat the later start wins.

    A line still being written, the last one, is left out; a damaged one as well, with a note.
    """

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for path in paths:
            damaged = DamagedLines(path)
            for step, data in FileLog(path).new_entries(damaged):
                yield step, {k: math.nan if v is None else v for k, v in data.items()}
            notes.extend(damaged.notes())

    return collect(rows())
