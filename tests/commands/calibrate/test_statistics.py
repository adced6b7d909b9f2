# SPDX-License-Identifier: Apache-2.0
"""Statistics against their definitions, and against pandas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from capo_verl.commands.calibrate import statistics, tables

RNG = np.random.default_rng(0)


def test_spearman_is_pearson_of_mean_ranks() -> None:
    x, y = RNG.integers(0, 5, 40).astype(float), RNG.normal(size=40)
    expected = np.corrcoef(pd.Series(x).rank(), pd.Series(y).rank())[0, 1]
    assert statistics.spearman(x, y) == pytest.approx(expected, abs=1e-12)
    assert statistics.spearman(y, np.exp(3 * y)) == pytest.approx(1)
    assert np.isnan(statistics.spearman(np.ones(4), np.arange(4.0)))


def test_auroc_counts_pairs() -> None:
    score, positive = RNG.integers(0, 6, 30).astype(float), RNG.random(30) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert statistics.auroc(score, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(statistics.auroc(score, np.zeros(30, dtype=bool)))


def test_top_takes_the_largest_and_at_least_one() -> None:
    assert statistics.top(np.array([1.0, 5, 3]), 0.01).tolist() == [False, True, False]
    assert statistics.top(np.arange(200.0), 0.02).nonzero()[0].tolist() == [196, 197, 198, 199]


def test_slope_and_ratio_of_a_power_law() -> None:
    predicted = np.array([1e-6, 1e-5, 1e-4, 0.0])
    true = 50 * predicted**0.5
    assert statistics.log_slope(predicted, true) == pytest.approx(0.5)
    low, middle, high = statistics.ratio_quantiles(predicted, 7 * predicted)
    assert (low, middle, high) == pytest.approx((7, 7, 7))
    assert np.isnan(statistics.log_slope(predicted[2:], true[2:]))
    assert np.isnan(statistics.ratio_quantiles(np.zeros(3), np.ones(3))).all()


def test_intervals_contain_the_mean_and_leave_out_what_is_missing() -> None:
    found = statistics.interval([1.0, 2.0, 3.0, float("nan")])
    assert found.mean == pytest.approx(2)
    assert 1 <= found.low < 2 < found.high <= 3
    geometric = statistics.interval([1.0, 100.0, 0.0], geometric=True)
    assert geometric.mean == pytest.approx(10)
    assert statistics.interval([4.0]).low is None
    assert np.isnan(statistics.interval([]).mean)


def test_spread_is_the_error_that_is_left_after_one_factor() -> None:
    kl = np.array([1e-4, 1e-3, 1e-2])
    batches = pd.DataFrame({"kl/all": kl, "good": kl / 300, "bad": kl[::-1]})
    assert tables.spread(batches, "good") == pytest.approx(1)
    assert tables.spread(batches, "constant") == pytest.approx(10)
    assert tables.spread(batches, "bad") == pytest.approx(100)
