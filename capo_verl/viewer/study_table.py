# SPDX-License-Identifier: Apache-2.0
"""Tables of ``capo_verl.experiments.study``.

``runs.parquet`` has a row for each run, ``curves.parquet`` a row for each evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo_verl.viewer.config import flatten
from capo_verl.viewer.derived import ACCEPTED, ACCURACY, COMPLETIONS, REWARD
from capo_verl.viewer.series import Run, collect

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
        raise ValueError(f"{path}: cannot be read as a table ({type(e).__name__}: {e})") from e
    if "run_id" not in runs or not {"run_id", "step"} <= set(curves):
        raise ValueError(
            f"{path}: not a table of capo_verl.experiments.study (no column run_id); give the "
            "folder that it wrote"
        )
    rows = dict(tuple(curves.groupby("run_id", sort=False)))
    found = []
    for about in runs.to_dict("records"):
        curve = rows.get(about["run_id"])
        if curve is not None:
            config = _config(about)
            found.append(Run(_name(config, about["run_id"]), path, collect(_points(curve)), config))
    if not found:
        raise ValueError(
            f"{path}: no run has a curve yet; see python -m capo_verl.experiments.study status"
        )
    return found


def _points(curve: Any) -> list[tuple[int, dict[str, Any]]]:
    known = {column: name for column, name in METRICS.items() if column in curve}
    return [
        (int(row["step"]), {name: row[column] for column, name in known.items()})
        for row in curve.to_dict("records")
    ]


def _config(about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the run, which the table keeps as JSON, with its study, tier and method.

    Without the JSON, the columns that name the run.
    """
    settings = about.get(CONFIG)
    if isinstance(settings, str):
        settings = json.loads(settings)
    settings = flatten(settings) if isinstance(settings, Mapping) else {}
    named = {key: about[key] for key in (*ABOUT, *NAMED) if about.get(key) is not None}
    return {**settings, **named}


def _name(config: Mapping[str, Any], run_id: str) -> str:
    parts = [
        str(config[key]) if key in ("method", "task") else f"{key}={config[key]:g}"
        for key in NAMED
        if key in config
    ]
    return " ".join(parts) or run_id
