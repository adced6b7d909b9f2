# SPDX-License-Identifier: Apache-2.0
"""Methods against a named control, paired by seed, cell by cell, with intervals.

Robustness over the learning rate is an area between the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from capo_verl.data.evaluation.estimates import LEVEL, Estimate
from capo_verl.experiments.study.measures import first_reached

RESAMPLES = 2_000
SHARE = 0.95
"""Share of the tuned control's final accuracy at which a method has reached it."""
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""0.975 quantiles of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """Method minus control in one cell."""

    method: str
    cell: str
    estimate: Estimate
    """Mean over seeds, with the 95 % bootstrap interval."""
    seeds: int
    verdict: str
    """``better``, ``worse`` or ``same``: see :func:`verdict`."""


def verdict(differences: Sequence[float]) -> str:
    """Verdict on a mean: ``better``, ``worse`` or ``same``.

    Both the bootstrap and Student's 95 % interval must exclude 0, or it is ``same``.

    The bootstrap of five seeds alone is too narrow; Student's alone assumes much. Fewer than three
    seeds decide nothing.
    """
    n = len(differences)
    if n < 3:
        return "same"
    mean, low, high = interval(differences)
    half = T_975[min(n - 1, len(T_975)) - 1] * float(np.std(differences, ddof=1)) / math.sqrt(n)
    if min(low, mean - half) > 0:
        return "better"
    return "worse" if max(high, mean + half) < 0 else "same"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over seeds; the mean itself for a single one."""
    x = np.asarray(values, dtype=np.float64)
    # A generator per call: the interval depends on the values alone, not on what was asked before.
    draws = x[np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(x.mean()), float(low), float(high)


def base_cell(cell: str) -> str:
    """A cell without the dotted axes, which the control may lack."""
    return json.dumps({k: v for k, v in json.loads(cell).items() if "." not in k})


def differences(frame: pd.DataFrame, measure: str = "final") -> list[Difference]:
    """Every method in every cell against the frame's control in the same cell, paired by seed.

    Args:
        frame: of one study, :func:`capo_verl.experiments.study.frame.study_frame`; failed runs
            count as accuracy 0 in ``final``.
    """
    scored = scores(frame, measure)
    control = scored[scored["method"] == scored["control"]]
    against = {
        (base_cell(c), s): v
        for c, s, v in zip(control["cell"], control["seed"], control[measure], strict=True)
    }
    result = []
    for (method, cell), rows in scored[scored["method"] != scored["control"]].groupby(
        ["method", "cell"], sort=False
    ):
        pairs = [
            value - against[base_cell(cell), seed]
            for seed, value in zip(rows["seed"], rows[measure], strict=True)
            if (base_cell(cell), seed) in against
        ]
        if pairs:
            mean, low, high = interval(pairs)
            result.append(
                Difference(method, cell, Estimate(mean, low, high), len(pairs), verdict(pairs))
            )
    return result


def scores(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows with a value; a failed run has accuracy 0.

    Dropping it would flatter its method.
    """
    if measure != "final":
        return frame[frame[measure].notna()]
    frame = frame.copy()
    frame.loc[frame["status"] == "failed", "final"] = 0.0
    return frame[frame["final"].notna()]


def over_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Area between method and control over the learning-rate axis.

    It is the mean difference of ``final`` along log(lr), by the trapezoid rule. One row per method
    and cell without lr, with interval over seeds.
    """
    scored = scores(frame, "final").copy()
    scored["rest"] = [
        json.dumps({k: v for k, v in json.loads(c).items() if k != "lr"}) for c in scored["cell"]
    ]
    control = scored[scored["method"] == scored["control"]]
    against = {
        (base_cell(r), s, lr): v
        for r, s, lr, v in zip(
            control["rest"], control["seed"], control["lr"], control["final"], strict=True
        )
    }
    result = []
    for (method, rest), rows in scored[scored["method"] != scored["control"]].groupby(
        ["method", "rest"], sort=False
    ):
        areas = []
        for seed, of_seed in rows.groupby("seed"):
            curve = sorted(
                (math.log(lr), v - against[base_cell(rest), seed, lr])
                for lr, v in zip(of_seed["lr"], of_seed["final"], strict=True)
                if (base_cell(rest), seed, lr) in against
            )
            if len(curve) > 1 and curve[-1][0] > curve[0][0]:
                x, y = (np.array(v) for v in zip(*curve, strict=True))
                areas.append(float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0])))
        if areas:
            mean, low, high = interval(areas)
            result.append(
                {
                    "method": method,
                    "cell": rest,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "verdict": verdict(areas),
                }
            )
    return pd.DataFrame(result, columns=["method", "cell", "mean", "low", "high", "verdict"])


def tuned_control(frame: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """The control's best learning rate and its mean final accuracy there, by cell.

    The cells are those without lr and dotted axes.
    """
    control = scores(frame, "final")
    control = control[control["method"] == control["control"]]
    best: dict[str, tuple[float, float]] = {}
    for (cell, lr), rows in control.groupby(["cell", "lr"]):
        key, value = _without_rate(cell), float(rows["final"].mean())
        if key not in best or value > best[key][1]:
            best[key] = (float(lr), value)
    return best


def efficiency(frame: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Completions and accepted tokens until a run reaches a share of the control's accuracy.

    The share is :data:`SHARE`, the accuracy that of the tuned control at the end.

    Returns:
        ``run_id``, ``method``, ``cell``, ``lr``, ``seed``, ``target``, ``completions``,
        ``accepted_tokens`` (NaN: never).
    """
    targets = tuned_control(frame)
    by_run = {
        run: rows.sort_values("step").to_dict("records") for run, rows in curves.groupby("run_id")
    }
    result = []
    for run in frame.itertuples():
        key = _without_rate(run.cell)
        if key not in targets:
            continue
        target, curve = SHARE * targets[key][1], by_run.get(run.run_id, [])
        row = {
            "run_id": run.run_id,
            "method": run.method,
            "cell": run.cell,
            "lr": run.lr,
            "seed": run.seed,
            "target": target,
        }
        for over in ("completions", "accepted_tokens"):
            reached = first_reached(curve, target, over) if curve and over in curve[-1] else None
            row[over] = float("nan") if reached is None else reached
        result.append(row)
    return pd.DataFrame(result)


def _without_rate(cell: str) -> str:
    return json.dumps({k: v for k, v in json.loads(cell).items() if k != "lr" and "." not in k})
