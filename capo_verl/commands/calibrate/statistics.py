# SPDX-License-Identifier: Apache-2.0
"""Quality of one quantity as a predictor of another: rank correlation, slope, ratio, AUROC;
intervals over optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from capo_verl.data.evaluation.estimates import LEVEL, Estimate

TOP_SHARE = 0.01
"""Share of the tokens, those with the largest true KL divergence, which a predictor has to find."""
RESAMPLES = 2000


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; NaN if one of them is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half
    (Mann-Whitney).

    Args:
        positive: ``[N]`` bool.

    Returns:
        NaN unless there are both.
    """
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return float("nan")
    return float((ranks(score)[positive].sum() - p * (p + 1) / 2) / (p * n))


def top(x: np.ndarray, share: float = TOP_SHARE) -> np.ndarray:
    """``[N]`` bool, the ``ceil(share * N)`` largest."""
    chosen = np.zeros(len(x), dtype=bool)
    chosen[np.argsort(-x, kind="stable")[: max(1, int(np.ceil(share * len(x))))]] = True
    return chosen


def log_slope(predicted: np.ndarray, true: np.ndarray) -> float:
    """Slope of ``log true`` over ``log predicted`` by least squares, over the tokens where both are
    positive.

    1: the prediction is right up to a factor. NaN for fewer than three tokens or a constant
       prediction.
    """
    both = (predicted > 0) & (true > 0)
    if both.sum() < 3:
        return float("nan")
    x, y = np.log(predicted[both]), np.log(true[both])
    x = x - x.mean()
    return float(x @ y / (x @ x)) if x @ x > 0 else float("nan")


def ratio_quantiles(
    predicted: np.ndarray, true: np.ndarray, at: Sequence[float] = (0.1, 0.5, 0.9)
) -> tuple[float, ...]:
    """Quantiles of true / predicted over the tokens where both are positive; NaN if there are
    none.
    """
    both = (predicted > 0) & (true > 0)
    if not both.any():
        return tuple(float("nan") for _ in at)
    return tuple(float(q) for q in np.quantile(true[both] / predicted[both], at))


def summary(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """All of the above for the tokens of one step: ``spearman, auroc, slope, ratio_10, ratio_50,
    ratio_90``.
    """
    low, median, high = ratio_quantiles(predicted, true)
    return {
        "spearman": spearman(predicted, true),
        "auroc": auroc(predicted, top(true)),
        "slope": log_slope(predicted, true),
        "ratio_10": low,
        "ratio_50": median,
        "ratio_90": high,
    }


def interval(
    values: Sequence[float] | np.ndarray, geometric: bool = False, seed: int = 0
) -> Estimate:
    """Mean over steps with its 95 % bootstrap interval; steps without a value (NaN) are left out.

    Args:
        geometric: the mean of positive numbers that spread over decades.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite) & ((finite > 0) | (not geometric))]
    if not len(finite):
        return Estimate(float("nan"), None, None)
    chosen = np.log(finite) if geometric else finite
    mean, low, high = float(chosen.mean()), None, None
    if len(chosen) > 1:
        picks = np.random.default_rng(seed).integers(len(chosen), size=(RESAMPLES, len(chosen)))
        low, high = np.quantile(chosen[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    if not geometric:
        return Estimate(mean, low, high)
    return Estimate(
        float(np.exp(mean)),
        *(None if bound is None else float(np.exp(bound)) for bound in (low, high)),
    )
