# SPDX-License-Identifier: Apache-2.0
"""One run as the viewer sees it, whatever wrote its log."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST, SMALLEST = 1e100, 1e-100
"""Sizes that are drawn: the difference of two values, and its square, must be numbers. Smaller ones
are 0.
"""
MOST_STEPS = 2**53
"""Largest step: the page's numbers are exact up to here."""


@dataclass
class Series:
    """Values of one metric at increasing steps.

    A value that cannot be drawn (NaN, infinite, or beyond :data:`LARGEST`) is NaN: a gap in the
    line.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def at(self) -> dict[int, float]:
        """Step -> value, NaN included."""
        return dict(zip(self.steps, self.values, strict=True))

    def known(self) -> dict[int, float]:
        """Step -> value where there is one."""
        return {step: value for step, value in self.at().items() if not math.isnan(value)}

    def gaps(self) -> list[int]:
        """Steps at which the value cannot be drawn."""
        return [step for step, value in self.at().items() if math.isnan(value)]


@dataclass
class Run:
    """A run's metrics and, where they were found, its configuration and samples of its tokens."""

    name: str
    source: Path
    series: dict[str, Series]
    """verl's metric names, and those of :mod:`capo_verl.viewer.derived`."""
    config: dict[str, Any] | None = None
    """Dotted keys; interpolations are text (:mod:`capo_verl.viewer.config`). None: not found."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Entries of ``capo_tokens.jsonl``."""
    part: str = ""
    """What of the source it is, if that holds several runs."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what of this run could not be read, or cannot be drawn."""


def step_number(value: Any, name: str = "step") -> int:
    """A logged step, or another index.

    Raises:
        ValueError: if it is no whole number from 0 to :data:`MOST_STEPS`.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MOST_STEPS
        or value != int(value)
    ):
        raise ValueError(f"its {name} is {reprlib.repr(value)}, not a whole number from 0 to 2^53")
    return int(value)


def _drawn(value: float) -> float:
    if not abs(value) <= LARGEST:
        return math.nan
    return float(value) if abs(value) >= SMALLEST else 0.0


def collect(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Series]:
    """Rows of ``(step, {metric: value})`` to series; what is no number is left out.

    A step that comes again (a resumed run) replaces the earlier one.
    """
    found: dict[str, dict[int, float]] = {}
    for step, data in rows:
        for key, value in data.items():
            if not isinstance(value, bool) and isinstance(value, int | float):
                found.setdefault(str(key), {})[step] = _drawn(value)
    return {key: Series(sorted(at), [at[step] for step in sorted(at)]) for key, at in found.items()}
