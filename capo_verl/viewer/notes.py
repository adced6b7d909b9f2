# SPDX-License-Identifier: Apache-2.0
"""Sentences about what could not be read or drawn, and text that is safe to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

LONGEST, MOST_SPANS = 160, 8

Damaged = Callable[[int, str], None]
"""Called with the number of a line, from 1, and what is wrong with it."""


def visible(text: str) -> str:
    """Text in one line: a character that does not print is shown as its escape, ``\\x1b`` say.

    Among them are line ends, a terminal's control sequences, marks that turn the direction of text,
    and halves of a surrogate pair, which no file can hold.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shorten(text: str, longest: int = LONGEST) -> str:
    """Text of at most so many characters; ``…`` stands for the rest."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def reason(error: BaseException) -> str:
    """An error's text, in one short line, with its kind unless that is ValueError."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return shorten(visible(" ".join(f"{kind}{error}".split())))


def spans(numbers: Iterable[int]) -> str:
    """Numbers in words: ``1, 3 to 7``."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    words = [str(a) if a == b else f"{a} to {b}" for a, b in found[:MOST_SPANS]]
    more = sum(b - a + 1 for a, b in found[MOST_SPANS:])
    return ", ".join(words) + (f" and {more} more" if more else "")


class DamagedLines:
    """Lines of a file that were left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[int] = []
        self._reason = ""

    def __call__(self, line: int, why: str) -> None:
        self._reason = self._reason or why
        self._lines.append(line)

    def notes(self) -> list[str]:
        """One sentence for all of them, with the reason of the first; none without any."""
        if not self._lines:
            return []
        if len(self._lines) == 1:
            return [f"{self._path}, line {self._lines[0]}: {self._reason}; it is left out"]
        lines = f"lines {spans(self._lines)} are left out"
        return [f"{self._path}: {lines}; line {self._lines[0]}: {self._reason}"]
