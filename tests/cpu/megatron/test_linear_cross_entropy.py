# SPDX-License-Identifier: Apache-2.0
"""The fused cross-entropy of the CPU against dense float64: values and gradients, whole and sharded
over ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from capo_verl.cpu.megatron.linear_cross_entropy import linear_cross_entropy
from tests.helpers.spawn import run_on_ranks

N, H, V, TEMPERATURE = 37, 8, 22, 0.7


def tensors() -> tuple[torch.Tensor, ...]:
    """Hidden states ``[N, 1, H]`` as Megatron has them, LM head, labels ``[1, N]``, weights of the
    two results in a loss.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 1, H, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(V, H, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (N, 1), generator=generator).T  # not contiguous
    return hidden, weight, labels, torch.randn(2, N, generator=generator, dtype=torch.float64)


def dense() -> list[torch.Tensor]:
    """As the definition is: log-probs, entropy, gradients of hidden states and LM head."""
    hidden, weight, labels, loss = tensors()
    hidden.requires_grad_(), weight.requires_grad_()
    log_softmax = (hidden[:, 0] @ weight.T / TEMPERATURE).log_softmax(-1)
    log_probs = log_softmax.gather(-1, labels.reshape(-1, 1))[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    (loss * torch.stack((log_probs, entropy))).sum().backward()
    return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]


def fused(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The same on this rank, with its share of the rows."""
    hidden, weight, labels, loss = tensors()
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    weight = weight.chunk(size)[rank].to(dtype).requires_grad_()
    hidden = hidden.to(dtype).requires_grad_()
    log_probs, entropy = linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none", group)
    (loss.to(dtype) * torch.stack((log_probs, entropy))).sum().backward()
    return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("scratch", [1 << 18, 5 * V, 1])
def test_equals_the_definition(scratch, monkeypatch):
    monkeypatch.setattr(
        "capo_verl.cpu.megatron.linear_cross_entropy.scratch_elements", lambda device: scratch
    )
    for got, want in zip(fused(), dense(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_float32():
    for got, want in zip(fused(torch.float32), dense(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-4)


def test_rows_spread_over_ranks():
    """Values on every rank; the gradient of the hidden states is the sum over ranks, that of the LM
    head each rank's rows.
    """
    log_probs, entropy, d_hidden, d_weight = dense()
    ranks = run_on_ranks(fused, 2)
    for rank, rows in zip(ranks, d_weight.chunk(2), strict=True):
        for got, want in zip((*rank[:2], rank[3]), (log_probs, entropy, rows), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], d_hidden, rtol=1e-11, atol=1e-13)
    assert float((ranks[0][2] - d_hidden).abs().max()) > 0.1


def test_large_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    log_probs, entropy = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 1]), 1.0, "none", None
    )
    torch.testing.assert_close(log_probs, torch.zeros(2))
    torch.testing.assert_close(entropy, torch.zeros(2))


def test_another_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction='sum' is not supported; use 'none'"):
        linear_cross_entropy(
            torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1.0, "sum"
        )
