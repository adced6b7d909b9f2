# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from capo_verl.data.evaluation.estimates import (
    Estimate,
    estimates,
    majority,
    pass_at_k,
    powers_of_two,
)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        correct = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(correct, k))
            assert pass_at_k(n, c, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )


def test_pass_at_k_with_many_samples():
    assert pass_at_k(1000, 3, 100) == pytest.approx(1 - comb(997, 100) / comb(1000, 100), abs=1e-12)
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples, there are 4"):
        pass_at_k(4, 1, 5)


def test_majority():
    assert majority(["a", "b", "b"], [0.0, 1.0, 1.0]) == 1.0
    assert majority(["a", "b"], [0.0, 1.0]) == 0.5
    assert majority(["", "", "b"], [0.0, 0.0, 1.0]) == 1.0
    assert majority(["", ""], [0.0, 0.0]) == 0.0


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_intervals_against_the_normal_approximation():
    values = np.random.default_rng(1).random(400)
    estimate = estimates({"a": {"m": values.tolist()}})["a"]["m"]
    error = 1.96 * values.std() / np.sqrt(400)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert estimate.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_problems_are_resampled_whole():
    """Sixteen samples of ten problems, all right or all wrong: as uncertain as ten coins, not as
    160.
    """
    one = estimates({"a": {"avg@16": [1.0] * 5 + [0.0] * 5}})["a"]["avg@16"]
    assert one.high - one.low >= 0.5


def test_average_of_groups_and_determinism():
    groups = {"a": {"m": [0.0, 1.0, 1.0], "only": [1.0, 1.0, 1.0]}, "b": {"m": [0.0, 0.0]}}
    result = estimates(groups, seed=3)
    assert result["average"].keys() == {"m"}
    assert result["average"]["m"].mean == pytest.approx((2 / 3 + 0) / 2)
    assert result["average"]["m"].high == pytest.approx(0.5)
    assert result == estimates(groups, seed=3)
    assert "average" not in estimates({"a": groups["a"]})


def test_one_problem_has_no_interval():
    assert estimates({"a": {"m": [0.25]}}) == {"a": {"m": Estimate(0.25, None, None)}}
