# SPDX-License-Identifier: Apache-2.0
"""The k best rows of every token against a stable sort in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capo_verl.core.kernels import fused, plain
from capo_verl.core.keys import LOWEST, NON_FINITE, ids_of, keys_of, logits_of
from capo_verl.core.logits import LogitRows, VocabShard
from tests.helpers import oracle

KERNELS = pytest.mark.parametrize("kernels", [plain, fused], ids=["torch", "triton"])


def expected(logits: torch.Tensor, k: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits of the k best of every row, best first, of equal logits the lower id."""
    values = logits.double().cpu().numpy()
    ids = (
        np.stack([oracle.support(row, k) for row in values])
        if len(values)
        else np.zeros((0, k), int)
    )
    return ids + start, np.take_along_axis(values, ids, 1)


def check(kernels, rows: LogitRows, exact: torch.Tensor, k: int, shard: VocabShard) -> None:
    keys = kernels.best_keys(rows, k, shard)
    assert keys.shape == (len(rows), k)
    ids, values = expected(exact, k, shard.start)
    np.testing.assert_array_equal(ids_of(keys).cpu().numpy(), ids)
    np.testing.assert_array_equal(logits_of(keys).cpu().numpy(), values)


def random_logits(
    kind: str, n: int, rows: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    x = 3 * torch.randn(n, rows, device=device)
    if kind == "ties":
        x = x.round()
    elif kind == "flat":
        x = torch.where(torch.rand_like(x) < 0.5, 0.0, -0.0)  # minus zero is zero
    elif kind == "comb":  # the largest lie where the groups of the first pass are the same
        x[:, :: fused.support_kernel.GROUPS] += 50
        x[:, 1 :: fused.support_kernel.GROUPS] += 40
    return x.to(dtype)


@KERNELS
@pytest.mark.parametrize("kind", ["random", "ties", "flat", "comb"])
@pytest.mark.parametrize(
    ("n", "rows", "k"), [(3, 4500, 50), (5, 37, 13), (2, 700, 1), (0, 40, 5), (1, 8, 8)]
)
def test_equals_a_stable_sort(kernels, kind, n, rows, k, device):
    x = random_logits(kind, n, rows, torch.float32, device)
    check(kernels, LogitRows(x), x, k, VocabShard(rows, rows, 0))


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "division"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_positions_temperature_strides_and_padding(kernels, dtype, division, device):
    """As the trainer calls it: some positions of a larger tensor, divided by the temperature in the
    logits' dtype, or as a fused cross-entropy does in float32.
    """
    n, rows, real, start = 3, 60, 55, 120
    wide = random_logits("random", 6, 2 * rows, dtype, device)
    wide[:, real:] = 99  # rows that only pad the vocabulary
    logits = wide[:, :rows]
    positions = torch.randperm(6, device=device)[:n]
    temperature = (torch.rand(n, device=device) + 0.5).to(division)
    cooled = (logits[positions, :real].double() / temperature[:, None].double()).to(division)
    check(
        kernels,
        LogitRows(logits, positions, temperature),
        cooled,
        9,
        VocabShard(start + real, rows, start),
    )


@KERNELS
def test_what_is_not_finite_is_marked(kernels, device):
    x = torch.randn(5, 70, device=device)
    x[0, 3], x[1, 69], x[2, 0] = float("nan"), float("inf"), -float("inf")
    keys = kernels.best_keys(LogitRows(x), 6, VocabShard(70, 70, 0))
    assert (keys[:, 0] == NON_FINITE).tolist() == [True, True, True, False, False]
    check(kernels, LogitRows(x[3:]), x[3:], 6, VocabShard(70, 70, 0))
    overflow = torch.full((1, 70), 6e4, device=device).half()
    cold = torch.full((1,), 0.5, device=device).half()
    keys = kernels.best_keys(LogitRows(overflow, None, cold), 6, VocabShard(70, 70, 0))
    assert keys[0, 0] == NON_FINITE


@KERNELS
def test_a_shard_with_fewer_rows_fills_up(kernels, device):
    x = torch.randn(4, 16, device=device)
    keys = kernels.best_keys(LogitRows(x), 7, VocabShard(103, 16, 100))  # 3 real rows
    np.testing.assert_array_equal(ids_of(keys[:, :3]).cpu().numpy(), expected(x[:, :3], 3, 100)[0])
    assert (keys[:, 3:] == LOWEST).all()
    assert (kernels.best_keys(LogitRows(x), 7, VocabShard(90, 16, 100)) == LOWEST).all()  # none


def test_places_without_a_token_have_no_candidates(device):
    x = torch.randn(3, 40, device=device)
    positions = torch.tensor([2, -1, 0], device=device)
    keys = fused.best_keys(LogitRows(x, positions), 5, VocabShard(40, 40, 0))
    assert (keys[1] == LOWEST).all()
    np.testing.assert_array_equal(ids_of(keys[[0, 2]]).cpu().numpy(), expected(x[[2, 0]], 5, 0)[0])


def test_keys_sort_as_the_support_does():
    logits = torch.tensor([2.0, -0.0, 0.0, -3.5, 1e-40, -1e-40, 2.0, float("inf"), -65504.0])
    ids = torch.arange(len(logits))
    keys = keys_of(logits, ids)
    order = keys.argsort(descending=True)
    assert order.tolist() == [7, 0, 6, 4, 1, 2, 5, 3, 8]
    assert torch.equal(ids_of(keys), ids) and torch.equal(logits_of(keys), logits + 0.0)
