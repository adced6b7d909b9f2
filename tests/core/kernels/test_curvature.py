# SPDX-License-Identifier: Apache-2.0
"""The three sums of every token against ``P(g) h`` written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capo_verl.core.kernels import fused, plain
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.logits import VocabShard
from capo_verl.core.support import TopKSupport
from tests.helpers.oracle import Oracle

KERNELS = pytest.mark.parametrize("kernels", [plain, fused], ids=["torch", "triton"])
BETAS = (0.8, 0.95)


def make(
    n,
    h,
    k,
    device,
    *,
    rows,
    start,
    steps=4,
    eps=1e-6,
    hidden=torch.float32,
    moments=torch.float32,
    betas=BETAS,
):
    """Random tokens whose supports lie in ``0 .. 3 rows``, and a shard of it."""
    vocab = 3 * rows
    ids = (
        torch.stack([torch.randperm(vocab)[:k] for _ in range(n)])
        if n
        else torch.zeros(0, k, dtype=torch.int64)
    )
    actions = torch.randint(vocab, (n,))
    for i in range(0, n, 2):  # taken tokens in the support and held here
        actions[i] = ids[i, 0] = next(t for t in range(start, start + rows) if t not in ids[i, 1:])
    support = TopKSupport(
        ids.to(device), torch.randn(n, k, device=device).softmax(-1),
        torch.ones(n, device=device).bool(), actions.to(device), VocabShard(vocab, rows, start),
    )  # fmt: skip
    wide = torch.randn(n, 2 * h, device=device).to(hidden)
    state = Moments(
        (0.01 * torch.randn(rows, h, device=device)).to(moments),
        (1e-4 * torch.rand(rows, h, device=device)).to(moments),
        torch.tensor(steps, device=device), betas, eps, start,
    )  # fmt: skip
    return wide[:, h:], torch.randn(n, device=device), support, state


def written_out(hidden, advantages, support, state) -> np.ndarray:
    rows, h = state.exp_avg.shape
    oracle = Oracle(rows, h, betas=state.betas, eps=state.eps, step_count=int(state.steps))
    oracle.exp_avg, oracle.exp_avg_sq = (
        x.double().cpu().numpy() for x in (state.exp_avg, state.exp_avg_sq)
    )
    sums = np.zeros((len(advantages), 3))
    for i in range(len(advantages)):
        x = hidden[i].double().cpu().numpy()
        for token, pi in zip(
            support.ids[i].tolist(), support.probs[i].double().tolist(), strict=True
        ):
            row = token - support.shard.start
            if 0 <= row < rows:
                taken = float(token == int(support.actions[i]))
                g = float(advantages[i]) * (taken - pi) * x
                u = oracle.precondition(np.array([row]), g[None])[0] @ x
                sums[i] += (taken * u, pi * u, pi * u * u)
    return sums


@KERNELS
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    ("n", "h", "k", "rows", "start"),
    [
        (5, 40, 13, 30, 0),
        (3, 300, 50, 40, 40),
        (2, 1, 1, 9, 9),
        (1, 257, 7, 20, 20),
        (0, 8, 3, 9, 0),
        (4, 64, 20, 8, 8),
    ],
)
def test_equals_the_formula(kernels, steps, n, h, k, rows, start, device):
    case = make(n, h, k, device, rows=rows, start=start, steps=steps)
    sums = kernels.partial_sums(*case)
    assert sums.shape == (n, 3) and sums.dtype == torch.float32
    exact = written_out(*case)
    scale = np.abs(exact).max(0, initial=1e-30)
    np.testing.assert_allclose(sums.cpu().numpy() / scale, exact / scale, atol=3e-6)
    assert k == 1 or np.count_nonzero(exact[:, 0]) >= n // 2


@KERNELS
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_every_dtype_is_summed_in_float32(kernels, hidden, moments, device):
    case = make(3, 70, 9, device, rows=12, start=12, hidden=hidden, moments=moments)
    exact = written_out(*case)
    scale = np.abs(exact).max(0)
    assert (scale > 0).all()
    np.testing.assert_allclose(
        kernels.partial_sums(*case).cpu().numpy() / scale, exact / scale, atol=3e-6
    )


@KERNELS
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.999)])
def test_extreme_decay_rates(kernels, betas, device):
    case = make(3, 33, 6, device, rows=10, start=0, betas=betas)
    exact = written_out(*case)
    scale = np.abs(exact).max(0)
    assert (scale > 0).all()
    np.testing.assert_allclose(
        kernels.partial_sums(*case).cpu().numpy() / scale, exact / scale, atol=3e-6
    )


@KERNELS
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    ("h", "k", "rows", "start"), [(40, 13, 30, 0), (300, 50, 40, 40), (64, 20, 8, 8)]
)
def test_directions_are_kept_on_request(kernels, steps, h, k, rows, start, device):
    """u of every entry, 0 for other ranks' rows; the sums are the same."""
    hidden, advantages, support, state = make(4, h, k, device, rows=rows, start=start, steps=steps)
    directions = torch.full((4, k), torch.nan, device=device)
    sums = kernels.partial_sums(hidden, advantages, support, state, directions)
    torch.testing.assert_close(
        sums, kernels.partial_sums(hidden, advantages, support, state), rtol=1e-4, atol=1e-6
    )
    row = support.ids - start
    held = (row >= 0) & (row < rows)
    assert not directions[~held].any() and directions[held].all()
    from_directions = ((directions * support.taken).sum(-1), (support.probs * directions).sum(-1))
    torch.testing.assert_close(torch.stack(from_directions, -1), sums[:, :2], rtol=1e-4, atol=1e-6)
    squares = support.probs * directions.square()
    torch.testing.assert_close(squares.sum(-1), sums[:, 2], rtol=1e-4, atol=1e-6)


@KERNELS
def test_a_token_without_rows_here_has_sums_of_zero(kernels, device):
    hidden, advantages, support, state = make(2, 20, 4, device, rows=10, start=10)
    support.ids[1] = torch.tensor([0, 9, 20, 29], device=device)
    assert (kernels.partial_sums(hidden, advantages, support, state)[1] == 0).all()


def test_float64_is_not_narrowed(device):
    hidden, advantages, support, state = make(3, 20, 4, device, rows=10, start=10)
    support.probs = support.probs.double()
    wide = state._replace(exp_avg=state.exp_avg.double(), exp_avg_sq=state.exp_avg_sq.double())
    sums = fused.partial_sums(hidden.double(), advantages.double(), support, wide)
    assert sums.dtype == torch.float64
    np.testing.assert_allclose(
        sums.cpu().numpy(), written_out(hidden, advantages, support, state), rtol=1e-12
    )
