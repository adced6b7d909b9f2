# SPDX-License-Identifier: Apache-2.0
"""Measured steps as rows: how well each predictor did, per step and depth, and what the batch
did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from capo_verl.commands.calibrate.predictors import predictors
from capo_verl.commands.calibrate.statistics import interval, spearman, summary
from capo_verl.commands.calibrate.step import StepMeasurement


def step_rows(measurement: StepMeasurement, **about: Any) -> list[dict[str, Any]]:
    """One row per depth and predictor, with :func:`capo_verl.commands.calibrate.statistics.summary`
    of it.

    ``target`` is ``kl``, or ``objective`` for m_H against ``A (pi_new / pi_old - 1)``, whose
    ``auroc, slope, ratio`` are of the absolute values, with ``same_sign``, the share of the tokens
    whose sign it gets right.
    """
    rows: list[dict[str, Any]] = []
    known = predictors(measurement.tokens)
    for depth, kl in measurement.kl.items():
        for name, x in known.items():
            rows.append(
                {**about, "depth": depth, "target": "kl", "predictor": name, **summary(x, kl)}
            )
        predicted, true = measurement.tokens["objective_shift"], measurement.objective[depth]
        moved = true != 0
        row = {**summary(np.abs(predicted), np.abs(true)), "spearman": spearman(predicted, true)}
        row["same_sign"] = (
            float(np.mean(np.sign(predicted[moved]) == np.sign(true[moved])))
            if moved.any()
            else np.nan
        )
        rows.append(
            {**about, "depth": depth, "target": "objective", "predictor": "objective_shift", **row}
        )
    return [{"tokens": len(measurement.tokens["advantage"]), **row} for row in rows]


def batch_row(measurement: StepMeasurement, **about: Any) -> dict[str, Any]:
    """The batch-level numbers of one step."""
    return {**about, **measurement.batch}


def token_rows(
    measurement: StepMeasurement, keep: int, draw: int, depth: str = "all", **about: Any
) -> pd.DataFrame:
    """At most ``keep`` tokens of a step, drawn without replacement (by the seed ``draw``), in
    float32: for pictures.
    """
    columns = {n: x for n, x in measurement.tokens.items() if n not in ("sequence", "action")}
    frame = pd.DataFrame(
        {**columns, "kl": measurement.kl[depth], "objective": measurement.objective[depth]}
    )
    chosen = np.random.default_rng(draw).permutation(len(frame))[:keep]
    return frame.iloc[np.sort(chosen)].astype(np.float32).assign(**about)


def aggregate(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean over steps with the bootstrap interval: columns ``X, X_low, X_high`` for each statistic
    X; ratios geometrically.

    Args:
        rows: of :func:`step_rows`.
        by: columns to group by.
    """
    statistics = [
        c
        for c in ("spearman", "auroc", "slope", "ratio_10", "ratio_50", "ratio_90", "same_sign")
        if c in rows
    ]
    found = []
    for keys, group in rows.groupby(list(by), sort=False):
        record: dict[str, Any] = dict(zip(by, keys, strict=True))
        record["steps"] = len(group)
        for name in statistics:
            estimate = interval(group[name].to_numpy(), geometric=name.startswith("ratio"))
            record |= {
                name: estimate.mean,
                f"{name}_low": estimate.low,
                f"{name}_high": estimate.high,
            }
        found.append(record)
    return pd.DataFrame(found)


def spread(batches: pd.DataFrame, predictor: str, true: str = "kl/all") -> float:
    """By what factor a step's KL differs from a running calibration of a predictor:
    ``exp(sd(log(true / predictor)))`` over steps.

    1: the predictor knows the KL up to a constant. ``predictor="constant"`` predicts the same in
       every step: what curvature has
    to beat. NaN for fewer than two usable steps.
    """
    kl = batches[true].to_numpy(dtype=np.float64)
    x = (
        np.ones_like(kl)
        if predictor == "constant"
        else batches[predictor].to_numpy(dtype=np.float64)
    )
    both = (kl > 0) & (x > 0)
    if both.sum() < 2:
        return float("nan")
    return float(np.exp(np.std(np.log(kl[both] / x[both]), ddof=1)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """``mean [low, high]``; a dash where there is none."""
    if not np.isfinite(row[name]):
        return "–"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    text = f"{row[name]:.{digits}f}"
    return (
        text
        if low is None or not np.isfinite(low)
        else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
    )


def magnitude(x: float) -> str:
    """Two significant digits, readable over decades."""
    if not np.isfinite(x):
        return "–"
    return f"{float(f'{x:.2g}'):,.0f}" if x >= 100 else f"{x:.2g}"
