# SPDX-License-Identifier: Apache-2.0
"""Effects of a step: KL divergence and log-probability of every response token, from the LM head's
inputs before and after.

Logits of all tokens never exist: a run of tokens is multiplied with the old and with the new LM
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.core.chunks import chunk_slices
from capo_verl.core.logits import VocabShard, block_elements
from capo_verl.core.token_kl import token_kl


class Head(NamedTuple):
    """An LM head's parameters at one moment."""

    weight: Tensor
    """``[V, H]``"""
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, H]`` -> ``[n, V]`` float64; multiplied in the dtype of the model."""
        product = hidden @ self.weight.T
        return (product if self.bias is None else product + self.bias).double()


class Outcome(NamedTuple):
    """Effect on each response token, ``[N]`` float64."""

    kl: Tensor
    """KL(old || new), nats, exact over the vocabulary."""
    log_ratio: Tensor
    """log pi_new - log pi_old of the taken token."""


@torch.no_grad()
def before(hidden: Tensor, head: Head, actions: Tensor) -> dict[str, Tensor]:
    """``log_prob`` of the taken token, ``entropy`` (nats) and ``hidden``, the squared norm of h:
    ``[N]`` float64 each.
    """
    log_prob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float64)
    for tokens in _runs(hidden, head):
        log_probs = head.logits(hidden[tokens]).log_softmax(-1)
        log_prob[tokens] = log_probs.gather(-1, actions[tokens, None])[:, 0]
        entropy[tokens] = torch.special.entr(log_probs.exp()).sum(-1)
    return {"log_prob": log_prob, "entropy": entropy, "hidden": hidden.double().square().sum(-1)}


@torch.no_grad()
def outcomes(
    old_hidden: Tensor,
    old_head: Head,
    new_hidden: Mapping[str, Tensor],
    new_head: Head,
    actions: Tensor,
) -> dict[str, Outcome]:
    """
    Args:
        old_hidden: ``[N, H]``.
        new_hidden: depth -> ``[N, H]``, after a step that goes so deep.
        actions: ``[N]`` int64.
    """
    n, vocab = len(old_hidden), len(old_head.weight)
    shard = VocabShard(vocab, vocab, 0)
    found = {d: Outcome(*old_hidden.new_empty(2, n, dtype=torch.float64)) for d in new_hidden}
    for tokens in _runs(old_hidden, old_head):
        old = old_head.logits(old_hidden[tokens])
        old_log_prob = _log_prob(old, actions[tokens])
        for depth, hidden in new_hidden.items():
            new = new_head.logits(hidden[tokens])
            found[depth].kl[tokens] = token_kl(old, new, shard)
            found[depth].log_ratio[tokens] = _log_prob(new, actions[tokens]) - old_log_prob
    return found


@torch.no_grad()
def head_step(hidden: Tensor, old_head: Head, new_head: Head) -> Tensor:
    """``Var_pi(u) / 2`` with ``u = (W_new - W_old) h``: the exact-Fisher form along the LM head's
    real step, ``[N]`` float64.

    To second order this is the KL divergence of a step that moves the LM head only.
    """
    both = old_head.bias is not None and new_head.bias is not None
    delta = Head(new_head.weight - old_head.weight, new_head.bias - old_head.bias if both else None)  # type: ignore[operator]
    shift = hidden.new_empty(len(hidden), dtype=torch.float64)
    for tokens in _runs(hidden, old_head):
        pi = old_head.logits(hidden[tokens]).softmax(-1)
        u = delta.logits(hidden[tokens])
        u = u - (pi * u).sum(-1, keepdim=True)
        shift[tokens] = 0.5 * (pi * u * u).sum(-1)
    return shift


def _log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    return logits.gather(-1, actions[:, None])[:, 0] - logits.logsumexp(-1)


def _runs(hidden: Tensor, head: Head) -> Iterator[slice]:
    return chunk_slices(len(hidden), max(1, block_elements(hidden.device) // len(head.weight)))
