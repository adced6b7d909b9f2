# SPDX-License-Identifier: Apache-2.0
"""Tables of ``capo_verl.experiments.study``.

``runs.parquet`` has a row for each run, ``curves.parquet`` a row for each evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo_verl.viewer.config import settings
from capo_verl.viewer.derived import ACCEPTED, ACCURACY, COMPLETIONS, REWARD
from capo_verl.viewer.notes import reason, shorten, visible
from capo_verl.viewer.plain import plain
from capo_verl.viewer.series import Run, collect, step_number

RUNS, CURVES = "runs.parquet", "curves.parquet"
METRICS = {
    "accuracy": ACCURACY,
    "reward": REWARD,
    "completions": COMPLETIONS,
    "accepted_tokens": ACCEPTED,
    "rejection": "capo/rejection_rate",
    "weight": "capo/weight_mean",
    "kl": "capo/kl_mean",
    "scale": "capo/lr_scale",
    "entropy": "actor/entropy",
    "length": "response_length/mean",
    "grad_norm": "actor/grad_norm",
}
"""Columns of the curves -> the names that verl's logs have.

Each is the mean since the evaluation before.
"""
CONFIG, ABOUT = "config", ("study", "tier", "method", "cell", "batch", "steps")
NAMED = ("method", "task", "lr", "seed")


def is_study_table(path: Path) -> bool:
    """A table of runs, or a parquet file that is not beside one."""
    if path.suffix != ".parquet" or path.name == RUNS:
        return path.name == RUNS
    # Beside a table of runs, its curves and whatever else a study left in the folder.
    return not (path.parent / RUNS).is_file()


def read_study_table(path: Path) -> list[Run]:
    """The runs with a curve; those that failed before their first evaluation have none.

    A row with another step than a whole number is left out, with a note.

    Raises:
        ValueError: if a table is missing or is not one of ``capo_verl.experiments.study``.
    """
    import pandas as pd
    import pyarrow  # noqa: F401  without it pandas would ask for one of several packages

    curves_path = path.with_name(path.name.replace("runs", "curves"))
    if path.name == CURVES or not curves_path.is_file():
        missing = RUNS if path.name == CURVES else curves_path.name
        raise ValueError(
            f"{path}: the other table, {missing}, is not beside it; give the folder that "
            "capo_verl.experiments.study wrote"
        )
    try:
        runs, curves = pd.read_parquet(path), pd.read_parquet(curves_path)
    except Exception as e:  # of many kinds
        raise ValueError(
            f"{path}: cannot be read as a table with {curves_path.name} ({reason(e)})"
        ) from e
    if "run_id" not in runs or not {"run_id", "step"} <= set(curves):
        raise ValueError(
            f"{path}: not a table of capo_verl.experiments.study (no column run_id); give the "
            "folder that it wrote"
        )
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in curves.to_dict("records"):
        rows.setdefault(str(row["run_id"]), []).append(row)
    found = []
    for about in runs.to_dict("records"):
        run_id = str(about["run_id"])
        if run_id in rows:
            notes: list[str] = []
            config = _config(about, f"{path}, run {run_id}", notes)
            series = collect(_points(rows[run_id], f"{curves_path}, run {run_id}", notes))
            name = visible(_name(config, run_id))
            found.append(Run(name, path, series, config, part=f"run {run_id}", notes=notes))
    if not found:
        raise ValueError(
            f"{path}: no run has a curve yet; see python -m capo_verl.experiments.study status"
        )
    return found


def _points(
    rows: list[dict[str, Any]], source: str, notes: list[str]
) -> list[tuple[int, dict[str, Any]]]:
    found, bad = [], []
    for row in rows:
        try:
            step = step_number(row["step"])
        except ValueError as e:
            bad.append(str(e))
            continue
        # An empty cell, NaN in pandas, was not measured: it is no gap.
        cells = {name: row[column] for column, name in METRICS.items() if column in row}
        found.append((step, {name: value for name, value in cells.items() if value == value}))
    if bad:
        notes.append(f"{source}: {len(bad)} of {len(rows)} rows are left out; the first: {bad[0]}")
    return found


def _config(about: Mapping[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    """Settings of the run, which the table keeps as JSON, with its study, tier and method.

    Without the JSON, the columns that name the run.
    """
    config = about.get(CONFIG)
    own: dict[str, Any] = {}
    if isinstance(config, str | Mapping):
        try:
            own = settings(json.loads(config) if isinstance(config, str) else config)
        except (ValueError, RecursionError) as e:
            notes.append(f"{source}: its configuration cannot be read ({reason(e)})")
    named = {key: about[key] for key in (*ABOUT, *NAMED) if about.get(key) is not None}
    return {**own, **plain(named)}


def _name(config: Mapping[str, Any], run_id: str) -> str:
    parts = [
        str(config[key]) if key in ("method", "task") else f"{key}={_short(config[key])}"
        for key in NAMED
        if key in config
    ]
    return shorten(" ".join(parts)) or run_id


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
