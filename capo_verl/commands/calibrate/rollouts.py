# SPDX-License-Identifier: Apache-2.0
"""The batch of one policy-gradient step: padded sequences, which tokens are responses, and their
advantages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AGGREGATIONS = ("seq-mean-token-mean", "token-mean")


@dataclass(frozen=True)
class Rollouts:
    """B sequences of at most L tokens, padded on the right, so that a causal model needs no
    attention mask.
    """

    input_ids: Tensor
    """``[B, L]`` int64, prompt and response."""
    response_mask: Tensor
    """``[B, L]`` bool, the tokens that were sampled. Column 0 is False: nothing predicts it."""
    advantages: Tensor
    """``[B]``, one per sequence."""

    def __post_init__(self) -> None:
        if self.response_mask[:, 0].any():
            raise ValueError(
                "response_mask: the first token of a sequence cannot be a response; begin with a "
                "prompt"
            )
        if not self.response_mask.any():
            raise ValueError("response_mask: no response token in the batch")

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and column ``[N]`` of the position whose output predicts each response token, row by
        row.
        """
        row, column = self.response_mask.nonzero(as_tuple=True)
        return row, column - 1

    @property
    def actions(self) -> Tensor:
        """``[N]`` int64, the response tokens, in the order of :attr:`positions`."""
        return self.input_ids[self.response_mask]

    def token_weights(self, aggregation: str) -> Tensor:
        """``[N]``, the factor of each token's loss; they sum to 1, except that empty responses
        count as sequences.

        Args:
            aggregation: verl's ``loss_agg_mode``, one of :data:`AGGREGATIONS`.

        Raises:
            ValueError: for another one.
        """
        if aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation={aggregation!r}: expected one of {', '.join(AGGREGATIONS)}"
            )
        row, _ = self.positions
        if aggregation == "token-mean":
            return torch.full((len(row),), 1 / len(row), dtype=torch.float64, device=row.device)
        lengths = self.response_mask.sum(1)
        return 1 / (lengths[row].double() * len(lengths))

    def part(self, rows: slice) -> Rollouts:
        """Some sequences, without the columns that are padding in all of them."""
        mask = self.response_mask[rows]
        width = int(mask.any(0).nonzero().max()) + 1
        return Rollouts(self.input_ids[rows, :width], mask[:, :width], self.advantages[rows])

    def to(self, device: torch.device | str) -> Rollouts:
        """The same on another device."""
        return Rollouts(
            self.input_ids.to(device), self.response_mask.to(device), self.advantages.to(device)
        )


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    advantages: Tensor,
    pad_id: int = 0,
) -> Rollouts:
    """Pad prompts and responses, lists of token ids, to :class:`Rollouts`; ``advantages [B]``."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor([*prompt, *response])
        mask[i, len(prompt) : end] = True
    return Rollouts(ids, mask, advantages)


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO: ``(r - mean) / (std + eps)`` in each group, std with n - 1 as verl's (arXiv 2402.03300,
    section 4.1.2).

    Args:
        rewards: ``[groups, n]``, n >= 2.

    Returns:
        ``[groups * n]``, zero in groups whose rewards are all equal.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + eps)).flatten()
