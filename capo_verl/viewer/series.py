# SPDX-License-Identifier: Apache-2.0
"""One run as the viewer sees it, whatever wrote its log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Series:
    """Values of one metric at increasing steps; what was not finite is left out."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def at(self) -> dict[int, float]:
        """Step -> value."""
        return dict(zip(self.steps, self.values, strict=True))


@dataclass
class Run:
    """A run's metrics and, where they were found, its configuration and samples of its tokens."""

    name: str
    source: Path
    series: dict[str, Series]
    """verl's metric names, and those of :mod:`capo_verl.viewer.derived`."""
    config: dict[str, Any] | None = None
    """Resolved, with dotted keys; None: not found."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Entries of ``capo_tokens.jsonl``."""
    place: str = ""
    """Folder the run was found in, if a name of its own is needed to tell it from others."""


def collect(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Series]:
    """Rows of ``(step, {metric: value})`` to series.

    A step that comes again (a resumed run) replaces the earlier one.
    """
    found: dict[str, dict[int, float]] = {}
    for step, data in rows:
        for key, value in data.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                continue
            found.setdefault(key, {})[int(step)] = float(value)
    return {key: Series(sorted(at), [at[step] for step in sorted(at)]) for key, at in found.items()}
