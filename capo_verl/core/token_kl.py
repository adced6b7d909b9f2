# SPDX-License-Identifier: Apache-2.0
"""KL(old || new) of a policy at every token, over the whole vocabulary or from the
taken token alone.

Both are sums of ``phi(d) = exp(d) - 1 - d``, which is never negative. With ``d_j = log q_j - log
p_j`` over a vocabulary that is the KL divergence itself, because ``sum_j (q_j - p_j) = 0``
(Schulman 2020, "Approximating KL divergence", k3); and in this form an error common to all ``d_j``,
such as that of the two normalisers, enters only squared. A KL of 1e-8 nats survives float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.logits import VocabShard

_SMALL = 0.125
"""Below it, phi is taken from its series: exp(d) - 1 - d would lose ``eps / d`` of its digits."""
_SERIES = (1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880)


def token_kl(
    old_logits: Tensor,
    new_logits: Tensor,
    shard: VocabShard,
    tp_group: collectives.Group = None,
    *,
    temperature: Tensor | None = None,
) -> Tensor:
    """KL(old || new) in nats between the sampling distributions of N tokens, exact over the
    vocabulary.

    Args:
        old_logits, new_logits: ``[N, rows]``, this rank's vocabulary rows. Converted before
            anything is subtracted, a run of tokens at a time, so that no temporary grows with N.
        shard: which rows these are; those beyond the vocabulary are left out.
        tp_group: over which the vocabulary is spread. Collective, with the same N on all of its
            ranks.
        temperature: ``[N]`` > 0, divides both logits; None = already done.

    Returns:
        ``[N]`` float32 (float64 for float64 logits), >= 0, equal on all ranks of the group.
        Infinite where the new policy rules out a token which the old one does not, NaN where logits
        are not numbers.

    Raises:
        ValueError: if the shapes are not those of ``shard``.
    """
    for name, logits in (("old_logits", old_logits), ("new_logits", new_logits)):
        if list(logits.shape) != [len(old_logits), shard.rows]:
            raise ValueError(
                f"{name}: expected [N, {shard.rows}] (the vocabulary rows of this rank), got "
                f"{list(logits.shape)}"
            )
    dtype = torch.promote_types(
        torch.promote_types(old_logits.dtype, new_logits.dtype), torch.float32
    )
    n, rows = len(old_logits), shard.real_rows
    runs = list(chunk_slices(n, max(1, scratch_elements(old_logits.device) // max(1, rows))))

    def read(logits: Tensor, tokens: slice) -> Tensor:
        values = logits[tokens, :rows].to(dtype)
        return values if temperature is None else values / temperature[tokens, None].to(dtype)

    norms = old_logits.new_full((n, 2, 1), -torch.inf, dtype=dtype)
    if rows:
        for tokens in runs:
            for i, logits in enumerate((old_logits, new_logits)):
                norms[tokens, i, 0] = read(logits, tokens).logsumexp(-1)
    log_norms = collectives.gather(norms, tp_group).logsumexp(-1)

    total = norms.new_zeros(n)
    for tokens in runs if rows else ():
        total[tokens] = _divergence(
            read(old_logits, tokens),
            read(new_logits, tokens),
            *log_norms[tokens, :, None].unbind(1),
        )
    return collectives.sum_(total, (tp_group,))


def k3(old_log_probs: Tensor, new_log_probs: Tensor) -> Tensor:
    """``exp(r) - 1 - r`` with ``r = new - old``: >= 0, and unbiased for KL(old || new) if the old
    policy took the tokens.

    Args:
        old_log_probs, new_log_probs: ``[N]``, of the taken tokens.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if the shapes differ.
    """
    if old_log_probs.shape != new_log_probs.shape:
        raise ValueError(
            f"old_log_probs {list(old_log_probs.shape)} and new_log_probs "
            f"{list(new_log_probs.shape)}: expected the same tokens"
        )
    dtype = torch.promote_types(
        torch.promote_types(old_log_probs.dtype, new_log_probs.dtype), torch.float32
    )
    r = new_log_probs.to(dtype) - old_log_probs.to(dtype)
    return torch.where(r.abs() < _SMALL, _series(r), r.exp() - 1 - r)


def _divergence(old: Tensor, new: Tensor, old_norm: Tensor, new_norm: Tensor) -> Tensor:
    """This rank's part of the sum over the vocabulary, ``[n]``; logits ``[n, rows]``, normalisers
    ``[n, 1]``.
    """
    # The logits first: they are close, so their difference is exact, and what the normalisers add
    # is common to all.
    d = (new - old) - (new_norm - old_norm)
    p, q = (old - old_norm).exp(), (new - new_norm).exp()
    # p phi(d) = q - p - p d; where p is 0, d may be anything.
    large = q - p - torch.where(p > 0, p * d, torch.where(p == 0, 0.0, p))
    return torch.where(d.abs() < _SMALL, p * _series(d), large).sum(-1)


def _series(d: Tensor) -> Tensor:
    result = torch.full_like(d, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        result = result * d + coefficient
    return result * d * d
