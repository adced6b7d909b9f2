# SPDX-License-Identifier: Apache-2.0
"""Completions on disk, one JSON line each.

They are written as they arrive, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

SETTINGS = "settings.json"
FILE = "completions.jsonl"


@dataclass(frozen=True)
class Completion:
    """One answer to one problem."""

    key: str
    """Hash of the problem: :attr:`Problem.key`."""
    sample: int
    """0 .. n-1"""
    response: str
    tokens: int
    """Length of the response, the end token included."""
    truncated: bool
    """True if the response ended because there was no more room."""


class Store:
    """The completions of one model under one set of sampling parameters.

    Args:
        folder: made if missing.
        settings: what the completions depend on. None takes those that are there, for scoring only.

    Raises:
        ValueError: if the folder holds completions made with other settings, or none, for scoring
            only.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None) -> None:
        self.path = folder / FILE
        file = folder / SETTINGS
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if settings is None:
            if found is None:
                raise ValueError(
                    f"--score-only: {self.path} is not there; run once without --score-only"
                )
        elif found is None:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        elif different := [k for k in settings if found.get(k) != settings[k]]:
            listed = ", ".join(f"{k}={found.get(k)!r} (now {settings[k]!r})" for k in different)
            raise ValueError(
                f"{folder} holds completions made with {listed}: choose another --output, or "
                "--overwrite"
            )
        self.settings = dict(found if found is not None else settings or {})
        self._file: TextIO | None = None

    def read(self) -> dict[tuple[str, int], Completion]:
        """Everything that is there. A last line that was cut off is removed from the file.

        Raises:
            ValueError: naming a line in the middle that cannot be read.
        """
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")
        if lines[-1]:
            with self.path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        found = {}
        for number, line in enumerate(lines[:-1], 1):
            try:
                completion = Completion(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from error
            found[completion.key, completion.sample] = completion
        return found

    def add(self, completions: Iterable[Completion]) -> None:
        """Append, and flush, so that a kill loses nothing."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        for completion in completions:
            # Escaped: a response may hold halves of surrogate pairs, which UTF-8 does not have.
            self._file.write(json.dumps(asdict(completion), ensure_ascii=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
