# SPDX-License-Identifier: Apache-2.0
"""verl's ``file`` logger: one JSON object ``{"step": …, "data": {…}}`` a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capo_verl.viewer.run import Series, collect


def is_file_log(path: Path) -> bool:
    """Whether the first line is one of verl's."""
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        first = file.readline()
    try:
        entry = json.loads(first)
    except ValueError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("data"), dict) and "step" in entry


def read_file_log(path: Path) -> dict[str, Series]:
    """All metrics. A line still being written, the last one, is left out.

    Raises:
        ValueError: naming the line that is not verl's.
    """
    return collect(_rows(path))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            yield int(entry["step"]), dict(entry["data"])
        except (ValueError, KeyError, TypeError) as e:
            if number == len(lines):
                return
            raise ValueError(
                f"{path}, line {number}: not a line of verl's file logger ({type(e).__name__}: "
                f"{e}); remove the line, or give another file"
            ) from e
