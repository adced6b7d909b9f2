# SPDX-License-Identifier: Apache-2.0
"""Duplicates within a file, and problems that training and test files share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from capo_verl.data.rows import Row, question_of

SHINGLE = 5
"""Words in a row that are compared."""
NEAR = 0.5
"""Two problems are near each other if they share this much of their shingles (Jaccard index)."""


def normalise(text: str) -> str:
    """A question without case, punctuation, spacing and LaTeX's spacing commands.

    Two questions are the same if this text is.
    """
    text = re.sub(
        r"\\(?:left|right|!|,|;|:|quad|qquad|displaystyle|dfrac|tfrac)(?![a-z])", _spacing, text
    )
    return " ".join(re.findall(r"[^\W_]+|[-+*/=<>^]", text.lower()))


def _spacing(match: re.Match[str]) -> str:
    return "\\frac" if match[0].endswith("frac") else " "


def shingles(normalised: str) -> frozenset[int]:
    """Hashes of all runs of :data:`SHINGLE` words; of the whole text if it is shorter."""
    words = normalised.split()
    runs = range(max(1, len(words) - SHINGLE + 1))
    return frozenset(hash(tuple(words[i : i + SHINGLE])) for i in runs)


@dataclass
class Duplicates:
    """Repeated questions within one file."""

    exact: int = 0
    """Rows whose question came before."""
    contradictions: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of rows with the same question and another answer."""


@dataclass
class Overlap:
    """Pairs (row of a training file, row of a test file) that ask the same or nearly the same."""

    exact: list[tuple[int, int]] = field(default_factory=list)
    near: list[tuple[int, int]] = field(default_factory=list)

    @property
    def training_rows(self) -> set[int]:
        return {pair[0] for pair in (*self.exact, *self.near)}


def duplicates(rows: Sequence[Row]) -> Duplicates:
    """Rows of a file whose question, normalised, occurs more than once."""
    found = Duplicates()
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        before = first.setdefault(normalise(question_of(row)), i)
        if before != i:
            found.exact += 1
            if row["reward_model"]["ground_truth"] != rows[before]["reward_model"]["ground_truth"]:
                found.contradictions.append((before, i))
    return found


def overlap(
    train: Sequence[Row], test: Sequence[Row], instructions: Iterable[str] = (), near: bool = True
) -> Overlap:
    """Problems that both have: the same after :func:`normalise`, or nearly.

    Args:
        instructions: what templates add to every question; removed first.
        near: False compares exactly only: generated problems differ in a few numbers, as they
            should.

    Numbers are words: two problems that differ in one number of a long text count as near, on
    purpose.
    """
    strip = [text for text in instructions if text]
    keys = [
        [normalise(_without(question_of(row), strip)) for row in rows] for rows in (train, test)
    ]
    exact_index = defaultdict(list)
    shingle_index = defaultdict(list)
    train_shingles = [shingles(key) for key in keys[0]]
    for i, key in enumerate(keys[0]):
        exact_index[key].append(i)
        for shingle in train_shingles[i]:
            shingle_index[shingle].append(i)
    found = Overlap()
    for j, key in enumerate(keys[1]):
        same = exact_index.get(key, [])
        found.exact += [(i, j) for i in same]
        if not near:
            continue
        own = shingles(key)
        shared: dict[int, int] = defaultdict(int)
        for shingle in own:
            for i in shingle_index.get(shingle, ()):
                shared[i] += 1
        for i, count in sorted(shared.items()):
            if i not in same and count / (len(own) + len(train_shingles[i]) - count) >= NEAR:
                found.near.append((i, j))
    return found


def _without(text: str, parts: Sequence[str]) -> str:
    for part in parts:
        text = text.replace(part, " ")
    return text


def as_json(found: Mapping[str, Duplicates | Overlap]) -> dict[str, Any]:
    """Findings as plain data, for the report file."""
    return {name: asdict(value) for name, value in found.items()}
