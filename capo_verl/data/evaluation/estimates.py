# SPDX-License-Identifier: Apache-2.0
"""avg@n, pass@k and majority votes, with bootstrap confidence intervals over problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval, None for fewer than two problems."""

    mean: float
    low: float | None
    high: float | None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples is correct.

    The k are drawn without replacement from the samples there are.

    The unbiased estimator of Chen et al. (2021, arXiv 2107.03374, eq. 1): ``1 - C(n-c, k) / C(n,
    k)``.

    Raises:
        ValueError: if there are fewer than k samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def majority(predictions: Sequence[str], correct: Sequence[float]) -> float:
    """Share of correctness of the most frequent prediction; ties share.

    Empty predictions do not vote.
    """
    votes = Counter(p for p in predictions if p)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = dict(zip(predictions, correct, strict=True))
    winners = [right[p] for p, count in votes.items() if count == most]
    return sum(winners) / len(winners)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({*(1 << i for i in range(n.bit_length()) if 1 << i <= n), n})


def estimates(
    groups: Mapping[str, Mapping[str, Sequence[float]]], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, Estimate]]:
    """Means with intervals for each group, and for the unweighted average of several groups.

    Args:
        groups: data source to metric to one value per problem. Samples of one problem are not
            independent, therefore whole problems are resampled, those of a group together for all
            its metrics.
        seed: of the resampling.

    Returns:
        Group to metric to estimate; the average is called ``average`` and has the metrics that all
        groups have.
    """
    means: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, np.ndarray]] = {}
    for number, (group, metrics) in enumerate(groups.items()):
        values = np.array(list(metrics.values()), dtype=np.float64)  # [metrics, problems]
        generator = np.random.default_rng([seed, number])
        resampled = np.empty((resamples, len(values)))
        for i in range(resamples):
            resampled[i] = values[
                :, generator.integers(values.shape[1], size=values.shape[1])
            ].mean(axis=1)
        means[group] = dict(zip(metrics, values.mean(axis=1).tolist(), strict=True))
        single = values.shape[1] < 2
        draws[group] = {
            m: np.full(resamples, np.nan) if single else resampled[:, j]
            for j, m in enumerate(metrics)
        }
    if len(groups) > 1:
        common = [
            m
            for m in next(iter(groups.values()))
            if all(m in metrics for metrics in groups.values())
        ]
        means["average"] = {m: float(np.mean([means[g][m] for g in groups])) for m in common}
        draws["average"] = {m: np.mean([draws[g][m] for g in groups], axis=0) for m in common}
    return {g: {m: _estimate(means[g][m], draws[g][m]) for m in means[g]} for g in means}


def _estimate(mean: float, draws: np.ndarray) -> Estimate:
    if np.isnan(draws).any():
        return Estimate(mean, None, None)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))
