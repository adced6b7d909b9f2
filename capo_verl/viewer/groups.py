# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in nothing but their seed are drawn as one curve with a band."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capo_verl.viewer.config import UNIMPORTANT, names_key, varying_keys
from capo_verl.viewer.notes import shorten, visible
from capo_verl.viewer.panels import Curve, Panel, axis_values
from capo_verl.viewer.series import Run

LONGEST_SETTING = 60


@dataclass(frozen=True)
class Group:
    """Runs that are averaged."""

    label: str
    runs: list[Run]


@dataclass(frozen=True)
class Band:
    """Mean of a group's runs, and their range, at increasing x; NaN for a gap."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def group_runs(runs: Sequence[Run], over: Sequence[str] = ("seed",)) -> list[Group]:
    """Groups of runs whose configurations differ in the keys ``over`` only.

    They stand in the order of the first run of each.

    A key is named in full (``data.seed``) or by its last part, which may have a prefix (``seed`` is
    ``data_loader_seed`` as well). Without a configuration the name decides, apart from ``seed1``
    and the like in it.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_signature(run, over), []).append(run)
    varying = [
        key
        for key in varying_keys(run.config for run in runs)
        if not any(names_key(key, name) for name in over)
    ]
    return [Group(_label(members, over, varying), members) for members in found.values()]


def band(panel: Panel, curve: Curve, group: Group, axis: str) -> Band:
    """Mean and range at each step, over the runs of the group that logged a value there.

    Where one of them cannot be drawn there is a gap: the mean of the others is of other runs.
    """
    at: dict[int, list[tuple[float, float]]] = {}
    for run in group.runs:
        positions, series = axis_values(run, axis) or {}, panel.series(run, curve)
        for step, value in zip(series.steps, series.values, strict=True):
            if step in positions:
                at.setdefault(step, []).append((positions[step], value))
    steps = sorted(at)
    values = [[value for _, value in at[step]] for step in steps]
    return Band(
        [sum(x for x, _ in at[step]) / len(at[step]) for step in steps],
        [sum(v) / len(v) for v in values],
        [math.nan if any(map(math.isnan, v)) else min(v) for v in values],
        [math.nan if any(map(math.isnan, v)) else max(v) for v in values],
    )


def _without(name: str, over: Sequence[str]) -> str:
    return (
        re.sub(rf"[-_ .]?(?<![a-zA-Z])({'|'.join(map(re.escape, over))})[-_=]?\d+", "", name)
        if over
        else name
    )


def _signature(run: Run, over: Sequence[str]) -> str:
    if run.config is None:
        return f"named {_without(run.name, over)}"
    kept = {
        key: value
        for key, value in run.config.items()
        if not UNIMPORTANT.search(key) and not any(names_key(key, name) for name in over)
    }
    return json.dumps(kept, sort_keys=True, default=str)


def _label(members: list[Run], over: Sequence[str], varying: list[str]) -> str:
    if len(members) == 1:
        return members[0].name
    names = {_without(run.name, over) for run in members}
    name = names.pop() if len(names) == 1 else _settings(members[0].config or {}, varying)
    return f"{name or members[0].name} ({len(members)} runs)"


def _settings(config: Mapping[str, Any], varying: list[str]) -> str:
    return ", ".join(
        visible(shorten(f"{key.rsplit('.', 1)[-1]}={config[key]}", LONGEST_SETTING))
        for key in varying[:3]
        if key in config
    )
