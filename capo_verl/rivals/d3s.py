# SPDX-License-Identifier: Apache-2.0
"""D3S, dynamic down-sampling of responses and of tokens (arXiv 2509.22115)."""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, masked_mean, of_responses
from capo_verl.rivals.entropy_mask import highest_entropy


def widest(values: Tensor, size: int) -> Tensor:
    """The ``size`` values whose variance is greatest: the lowest few and the highest rest.

    Args:
        values: ``[B]``; size: from 1 to B.

    Returns:
        ``[B]`` bool. Of equal values the lowest are taken from the front, the highest from the end.
    """
    ordered, order = values.double().sort(stable=True)
    best, variance = 0, -1.0
    for low in range(size + 1):
        chosen = torch.cat((ordered[:low], ordered[len(values) - (size - low) :]))
        found = float(chosen.var(correction=0))
        if found > variance * (1 + 1e-12):
            best, variance = low, found
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[order[:best]] = True
    kept[order[len(values) - (size - best) :]] = True
    return kept


def d3s_advantages(
    advantages: Tensor,
    response_mask: Tensor,
    *,
    entropy: Tensor,
    sample_share: float,
    sample_share_end: float,
    top_share: float,
    top_share_end: float,
    progress: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Advantages of the chosen tokens, 0 for the others.

    First the responses of the batch whose advantages vary most, then their tokens of the highest
    ``|A| H``. All are scaled by n / n_selected, so that a mean over all tokens is one over the
    chosen ones.

    Args:
        advantages, response_mask: ``[B, T]``; entropy: ``[B, T]``, nats.
        progress: of the training, from 0 to 1; shares move linearly from their first to their last.

    Returns:
        Advantages ``[B, T]``; ``selected_share`` (tokens), ``selected_responses`` (share).
    """
    mask = response_mask.bool()
    present = mask.any(-1)
    if not bool(present.any()):
        return advantages * mask, {"selected_share": masked_mean(mask, mask)}
    samples = (1 - progress) * sample_share + progress * sample_share_end
    share = (1 - progress) * top_share + progress * top_share_end
    kept = torch.zeros_like(present)
    size = max(1, int(samples * int(present.sum()) + 1e-9))
    kept[present] = widest(of_responses(advantages, mask)[present], size)
    chosen = highest_entropy(advantages.abs() * entropy, mask & kept[:, None], share)
    scale = mask.sum().to(advantages.dtype) / chosen.sum()
    metrics = {
        "selected_share": masked_mean(chosen, mask),
        "selected_responses": masked_mean(kept, present),
    }
    return torch.where(chosen, advantages * scale, 0.0), metrics
