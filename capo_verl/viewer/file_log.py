# SPDX-License-Identifier: Apache-2.0
"""verl's ``file`` logger: one JSON object ``{"step": …, "data": {…}}`` a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from capo_verl.viewer.series import Series, collect


class Entry(NamedTuple):
    """One line."""

    step: int
    """0 is the validation before training."""
    data: dict[str, Any]
    """Metric -> value; verl writes NaN as null."""


class FileLog:
    """A log that may still grow.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = 0

    def new_entries(self) -> list[Entry]:
        """Entries that were completed since the last call; a line still being written is left for
        the next.

        Raises:
            ValueError: naming the line that is not verl's.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                *complete, rest = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in complete:
            self._offset += len(line) + 1
            self._lines += 1
            if not line.strip():
                continue
            try:
                found.append(parse(line))
            except ValueError as e:
                raise ValueError(
                    f"{self._path}, line {self._lines}: {e}; remove the line, or give another file"
                ) from e
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
        return Entry(int(entry["step"]), dict(entry["data"]))
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"not a line of verl's file logger ({type(e).__name__}: {e})") from e


def is_entry(line: bytes) -> bool:
    """True if a line is one of verl's."""
    try:
        parse(line)
    except ValueError:
        return False
    return True


def is_file_log(path: Path) -> bool:
    """True if the first line is one of verl's."""
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        return is_entry(file.readline())


def read_file_log(path: Path) -> dict[str, Series]:
    """All metrics. A line still being written, the last one, is left out.

    Raises:
        ValueError: naming the line that is not verl's.
    """
    return collect(FileLog(path).new_entries())
