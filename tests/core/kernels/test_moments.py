# SPDX-License-Identifier: Apache-2.0
"""Row sums and the moments' update against loops in float64; the same bits in every repetition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capo_verl.core.kernels import fused, plain
from capo_verl.core.kernels.entries import sort_by_row
from capo_verl.core.kernels.moments import Moments

KERNELS = pytest.mark.parametrize("kernels", [plain, fused], ids=["torch", "triton"])
SHAPES = pytest.mark.parametrize(
    ("n", "k", "h", "rows"),
    [(7, 5, 40, 12), (40, 3, 300, 6), (3, 2, 1, 30), (0, 4, 8, 5), (2, 9, 257, 50)],
)


def make(n, k, h, rows, device, hidden_dtype=torch.float32):
    """Entries of n tokens, half of them in rows of other ranks; a third of the tokens is rejected.

    And the sums, as loops.
    """
    row = torch.randint(-rows // 2, rows + rows // 2, (n, k))
    if n:
        row[:, 0] = 1  # a row in every support
    weight, include = torch.randn(n, k), torch.rand(n) < 0.7
    hidden = torch.randn(n, h).to(hidden_dtype)
    sums, counts = np.zeros((rows, h)), np.zeros(rows, int)
    for i, j in np.ndindex(n, k):
        if include[i] and 0 <= row[i, j] < rows:
            sums[row[i, j]] += float(weight[i, j]) * hidden[i].double().numpy()
            counts[row[i, j]] += 1
    entries = sort_by_row(*(x.to(device) for x in (row, weight, include)), rows)
    return entries, hidden.to(device), sums, counts


def random_moments(rows, h, device, dtype=torch.float32, steps=3) -> Moments:
    return Moments(
        torch.randn(rows, h, device=device).to(dtype), torch.rand(rows, h, device=device).to(dtype),
        torch.tensor(steps, device=device), (0.8, 0.95), 1e-8, 1000,
    )  # fmt: skip


def copy(moments: Moments) -> Moments:
    return moments._replace(exp_avg=moments.exp_avg.clone(), exp_avg_sq=moments.exp_avg_sq.clone())


def moved(moments: Moments, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = (x.double().cpu().numpy().copy() for x in (moments.exp_avg, moments.exp_avg_sq))
    for row in np.flatnonzero(counts):
        g = sums[row] / counts[row]
        first[row] = 0.8 * first[row] + 0.2 * g
        second[row] = 0.95 * second[row] + 0.05 * g**2
    return first, second


@SHAPES
def test_entries_are_sorted_by_row_then_token(n, k, h, rows, device):
    entries, _, _, counts = make(n, k, h, rows, device)
    np.testing.assert_array_equal(entries.counts.cpu().numpy(), counts)
    for row in range(rows):
        token = entries.token[entries.offsets[row] : entries.offsets[row + 1]].tolist()
        assert token == sorted(token)


@KERNELS
@SHAPES
def test_row_sums(kernels, n, k, h, rows, device):
    entries, hidden, sums, counts = make(n, k, h, rows, device)
    touched = torch.from_numpy(np.flatnonzero(counts + (np.arange(rows) % 3 == 0))).to(
        device
    )  # and some untouched ones
    out = kernels.row_sums(entries, touched, hidden)
    np.testing.assert_allclose(out.cpu().numpy(), sums[touched.cpu().numpy()], atol=2e-5)
    total = torch.randn(rows, 2 * h, device=device)
    before = total.clone()
    kernels.add_row_sums(entries, hidden, total[:, h:])
    np.testing.assert_allclose((total - before)[:, h:].cpu().numpy(), sums, atol=2e-5)
    assert torch.equal(total[:, :h], before[:, :h])


@KERNELS
@SHAPES
def test_update_from_entries(kernels, n, k, h, rows, device):
    entries, hidden, sums, counts = make(n, k, h, rows, device)
    moments = random_moments(rows, h, device)
    first, second = moved(moments, sums, counts)
    for columns in (slice(0, h // 2), slice(h // 2, h)):
        kernels.update(moments, columns, entries, hidden[:, columns])
    np.testing.assert_allclose(moments.exp_avg.cpu().numpy(), first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.exp_avg_sq.cpu().numpy(), second, rtol=1e-5, atol=1e-5)


@KERNELS
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_move_by_sums(kernels, some, device):
    rows, h = 9, 50
    counts = np.array([0, 3, 1, 0, 7, 1, 0, 2, 5])
    sums = np.random.default_rng(0).standard_normal((rows, h))
    listed = np.flatnonzero(counts) if some else np.arange(rows)
    moments = random_moments(rows, h, device)
    first, second = moved(moments, sums, counts)
    for columns in (slice(0, 20), slice(20, 50)):
        kernels.move(
            moments, columns, torch.from_numpy(listed).to(device) if some else None,
            torch.from_numpy(sums[listed, columns]).float().to(device),
            torch.from_numpy(counts[listed]).to(device),
        )  # fmt: skip
    np.testing.assert_allclose(moments.exp_avg.cpu().numpy(), first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.exp_avg_sq.cpu().numpy(), second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hidden_states_are_summed_in_float32(hidden_dtype, device):
    entries, hidden, sums, counts = make(20, 4, 60, 5, device, hidden_dtype)
    touched = torch.from_numpy(np.flatnonzero(counts)).to(device)
    for kernels in (plain, fused):
        out = kernels.row_sums(entries, touched, hidden)
        np.testing.assert_allclose(out.cpu().numpy(), sums[touched.cpu().numpy()], atol=2e-5)


def test_stochastic_rounding_draws_the_same_bits_in_both(device):
    """Sums of one entry leave no room for another order of summation: all moments agree to the
    bit.
    """
    row = torch.arange(6, device=device)[:, None]
    weight, hidden = torch.randn(6, 1, device=device), torch.randn(6, 30, device=device)
    entries = sort_by_row(row, weight, torch.ones(6, device=device).bool(), 6)
    ours = random_moments(6, 30, device, torch.bfloat16)
    theirs = copy(ours)
    for kernels, moments in ((plain, ours), (fused, theirs)):
        for columns in (slice(0, 13), slice(13, 30)):
            kernels.update(moments, columns, entries, hidden[:, columns])
    different = (ours.exp_avg != theirs.exp_avg) | (ours.exp_avg_sq != theirs.exp_avg_sq)
    # A fused multiply-add may round the float32 value below differently, and with it, rarely, the
    # stored one.
    assert different.float().mean() < 0.01


@KERNELS
def test_repeated_bit_for_bit(kernels, device):
    entries, hidden, _, _ = make(200, 6, 64, 8, device)
    start = random_moments(8, 64, device)
    results = []
    for _ in range(3):
        moments = copy(start)
        kernels.update(moments, slice(0, 64), entries, hidden)
        results.append(moments)
    assert all(torch.equal(r.exp_avg, results[0].exp_avg) for r in results)
    assert all(torch.equal(r.exp_avg_sq, results[0].exp_avg_sq) for r in results)
