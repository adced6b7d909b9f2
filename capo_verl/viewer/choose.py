# SPDX-License-Identifier: Apache-2.0
"""Choosing runs by their configuration: ``--where task=sort8 lr=1e-3``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capo_verl.viewer.config import names_key
from capo_verl.viewer.notes import shorten
from capo_verl.viewer.series import Run


def choose(runs: Sequence[Run], where: Sequence[str]) -> list[Run]:
    """Runs for which every ``KEY=VALUE`` holds; several values of one key mean any of them.

    Numbers are compared as numbers. A key is named in full or by its last part.

    Raises:
        ValueError: for an argument without ``=``, or if no run is left (with the values there are).
    """
    wanted: dict[str, list[str]] = {}
    for condition in where:
        key, equals, value = condition.partition("=")
        if not equals or not key:
            raise ValueError(
                f"--where {condition}: write KEY=VALUE, a key of the configuration and its value"
            )
        wanted.setdefault(key, []).append(value)
    left = list(runs)
    for key, values in wanted.items():
        before = left
        left = [
            run
            for run in left
            if any(_same(v, value) for v in _values(run, key) for value in values)
        ]
        if not left:
            there = sorted({shorten(str(v), 60) for run in before for v in _values(run, key)})
            shown = ", ".join(there[:20]) or "none: no configuration has this key"
            raise ValueError(
                f"--where {key}={' '.join(values)}: no run has it; values there are: {shown}"
            )
    return left


def _values(run: Run, key: str) -> list[Any]:
    return [value for name, value in (run.config or {}).items() if names_key(name, key)]


def _same(found: Any, wanted: str) -> bool:
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return str(found) == wanted
