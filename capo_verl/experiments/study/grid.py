# SPDX-License-Identifier: Apache-2.0
"""A study's YAML: methods x tasks x learning rates x batches x seeds.

```yaml
study: main
tier: tiny                     # or pretrained, or verl
defaults: {steps: 200}         # of every run
methods:                       # name -> keys of a run
  grpo: {}
  kl_budget: {capo: {mode: "off", kl_budget: {delta: 1.0e-4}}}
grid:                          # any key of a run -> values
  # a mapping sets several keys at once
  task: [sort8, {name: half fillers, task: fillers, task_knobs: {share: 0.5}}]
  lr: [1.0e-4, 1.0e-3]
  seed: [1, 2, 3, 4, 5]
  # a dotted key goes into the methods that have such a mapping, and leaves the others
  capo.kl_budget.delta: [1.0e-5, 1.0e-4]
control: grpo                  # what methods are compared with
# instead of `grid`: several, each with its own `grid`, `methods` (names) and `defaults`
grids: [...]
```
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from capo_verl.experiments.study.config import LoopConfig, RunConfig
from capo_verl.experiments.study.pretrained.config import PretrainedConfig
from capo_verl.experiments.study.verl_config import VerlRunConfig

TIERS: dict[str, type[LoopConfig] | type[VerlRunConfig]] = {
    "tiny": RunConfig,
    "pretrained": PretrainedConfig,
    "verl": VerlRunConfig,
}
KEYS = ("study", "tier", "about", "defaults", "methods", "grid", "grids", "control")


@dataclass(frozen=True)
class PlannedRun:
    """A run and where it belongs."""

    study: str
    tier: str
    method: str
    config: Any
    """Of the tier's class in :data:`TIERS`."""
    cell: tuple[tuple[str, str], ...] = ()
    """Axis and value of everything in the grid but the seed.

    The control may lack the dotted ones.
    """

    @property
    def run_id(self) -> str:
        return str(self.config.run_id)


@dataclass(frozen=True)
class Study:
    """A parsed study."""

    name: str
    tier: str
    control: str
    runs: tuple[PlannedRun, ...]


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: naming the file, the key and the value that cannot be used.
    """
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        return parse_study(data, default_name=Path(path).stem)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def parse_study(data: Mapping[str, Any], default_name: str = "study") -> Study:
    """A study from plain data, as :func:`load_study` reads it from YAML."""
    if not isinstance(data, Mapping):
        raise ValueError("expected a mapping with methods and grid")
    for key in data:
        if key not in KEYS:
            raise ValueError(f"{key} is not a key of a study. Valid keys: {', '.join(KEYS)}")
    name, tier = data.get("study", default_name), data.get("tier", "tiny")
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r}: expected one of {', '.join(TIERS)}")
    methods = data.get("methods") or {}
    control = data.get("control", "grpo")
    if control not in methods:
        raise ValueError(f"control={control!r}: expected one of the methods {', '.join(methods)}")
    grids = data.get("grids") or [{"grid": data.get("grid") or {}}]
    runs: dict[tuple[str, str], PlannedRun] = {}
    for grid in grids:
        for run in _expand(name, tier, methods, data.get("defaults") or {}, grid):
            runs.setdefault((run.method, run.run_id), run)
    return Study(name, tier, control, tuple(runs.values()))


def _expand(
    study: str,
    tier: str,
    methods: Mapping[str, Any],
    defaults: Mapping[str, Any],
    grid: Mapping[str, Any],
) -> Iterator[PlannedRun]:
    unknown = set(grid) - {"grid", "methods", "defaults"}
    if unknown:
        raise ValueError(
            f"grids.{sorted(unknown)[0]} is not a key of a grid. Valid keys: grid, methods, "
            "defaults"
        )
    axes = grid.get("grid") or {}
    names = grid.get("methods") or list(methods)
    lists = [v if isinstance(v, list) else [v] for v in axes.values()]
    for values in itertools.product(*lists):
        for name in names:
            if name not in methods:
                raise ValueError(
                    f"grids.methods: {name} is none of the methods {', '.join(methods)}"
                )
            method = copy.deepcopy(dict(methods[name] or {}))
            point: dict[str, Any] = {}
            cell = []
            for key, value in zip(axes, values, strict=True):
                if "." in key and not _set_dotted(method, key, value):
                    continue
                if "." not in key:
                    several = isinstance(value, dict)
                    point.update(
                        {k: v for k, v in value.items() if k != "name"} if several else {key: value}
                    )
                if key != "seed":
                    cell.append((key, label(value)))
            knobs = {**defaults, **(grid.get("defaults") or {}), **point, **method}
            try:
                yield PlannedRun(study, tier, name, TIERS[tier].from_mapping(knobs), tuple(cell))
            except ValueError as e:
                raise ValueError(f"methods.{name}: {e}") from None


def label(value: Any) -> str:
    """A value of an axis as text; numbers in the shortest form that tells them apart."""
    if isinstance(value, dict):
        return str(value.get("name") or ", ".join(f"{k}={label(v)}" for k, v in value.items()))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _set_dotted(method: dict[str, Any], key: str, value: Any) -> bool:
    """Set ``a.b.c`` in a method that has the mapping ``a.b``; whether it has."""
    *parents, last = key.split(".")
    inside: Any = method
    for parent in parents:
        inside = inside.get(parent) if isinstance(inside, dict) else None
    if not isinstance(inside, dict):
        return False
    inside[last] = value
    return True
