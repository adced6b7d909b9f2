# SPDX-License-Identifier: Apache-2.0
"""Shifts of a whole mini-batch: the diagnostics that spike before a collapse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.curvature import Shifts, sequence_sums, set_shifts
from capo_verl.core.optimizer_model import OptimizerModel
from capo_verl.core.support import FullSupport, Support, TopKSupport
from capo_verl.core.validation import Inputs, check_unmodified, version


class BatchShifts(NamedTuple):
    """m_H and m_F of a whole batch, two scalars each."""

    before: Shifts
    """All response tokens."""
    after: Shifts
    """Shifts of the tokens inside the trust region; of all, weighted, with soft weights."""


class _MicroBatch(NamedTuple):
    inputs: Inputs
    version: int
    """Of the hidden states, which are the caller's."""
    supports: list[Support]
    kept: Tensor
    advantages: Tensor


class RetainedTokens:
    """Keeps what :meth:`shifts` needs: the direction of the batch is known only after its last
    micro-batch.

    Args:
        max_tokens: tokens to keep per rank; micro-batches which would exceed it are left out,
            except the first. Places that hold no token count as well. 0 = off, None = no limit.
    """

    def __init__(self, max_tokens: int | None):
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        self._kept: list[_MicroBatch] = []
        self._places = 0
        self._tokens: list[Tensor] = []
        self._seen: list[Tensor] = []

    @property
    def coverage(self) -> Tensor:
        """Share of this rank's response tokens that is kept: scalar, 1 if there were none."""
        if not self._seen:
            return torch.ones(())
        kept, seen = (
            torch.stack(x).sum() if x else torch.zeros_like(self._seen[0])
            for x in (self._tokens, self._seen)
        )
        return torch.where(seen > 0, kept / seen, 1.0)

    def add(
        self, inputs: Inputs, supports: list[Support], kept: Tensor, advantages: Tensor
    ) -> None:
        """Keep one micro-batch.

        Args:
            supports: of its tokens, in parts.
            kept: ``[N]`` bool, the tokens ``after`` filtering; advantages: ``[N]``, theirs then.
        """
        n, tokens = len(kept), inputs.mask.sum()
        if self.max_tokens == 0 or (
            self._kept and self.max_tokens is not None and self._places + n > self.max_tokens
        ):
            self._seen.append(tokens)
            return
        no_logits = inputs.hidden.new_empty(
            0
        )  # not a view of the logits: it would keep all of them alive
        micro_batch = _MicroBatch(
            inputs._replace(logits=no_logits, odd=None), version(inputs.hidden),
            [s.snapshot() for s in supports], kept, advantages,
        )  # fmt: skip
        self._places += n
        self._kept.append(micro_batch)
        self._tokens.append(tokens)
        self._seen.append(tokens)

    def shifts(
        self,
        model: OptimizerModel,
        tp_group: collectives.Group,
        dp_group: collectives.Group,
        cp_group: collectives.Group,
        exact: bool = False,
    ) -> BatchShifts:
        """Mean over tokens per sequence, then over sequences, along the direction of the whole set.

        Raises:
            RuntimeError: if nothing was kept, or hidden states were overwritten since.
        """
        if self.max_tokens == 0:
            raise RuntimeError("batch_shifts() needs capo.batch_shift_tokens > 0 (or null)")
        if not self._kept:
            raise RuntimeError(
                "batch_shifts() found no tokens: call evaluate() before it, and step() after it"
            )
        for micro_batch in self._kept:
            check_unmodified(micro_batch.inputs.hidden, micro_batch.version)
        inputs = [kept.inputs for kept in self._kept]
        support = _concatenate([support for kept in self._kept for support in kept.supports])
        sequence = _number_sequences(inputs)
        num_sequences = sum(i.num_sequences for i in inputs)
        hidden = [i.hidden for i in inputs]
        learning_rate = inputs[-1].learning_rate

        def over(include: Tensor, advantages: Tensor) -> Shifts:
            per_token = set_shifts(
                model, support, hidden, advantages, include, torch.zeros_like(sequence), 1,
                learning_rate, tp_group, (dp_group, cp_group), exact,
            )  # fmt: skip
            sums, tokens = sequence_sums(per_token, include, sequence, num_sequences)
            # Context-parallel ranks hold slices of the same sequences.
            totals = collectives.sum_(torch.stack((*sums, tokens)), (cp_group,))
            means = totals[:2] / totals[2].clamp(min=1)
            overall = torch.cat((means.sum(-1), (totals[2] > 0).sum()[None].to(means.dtype)))
            objective, policy, sequences = collectives.sum_(overall, (dp_group,)).unbind()
            return Shifts(objective / sequences.clamp(min=1), policy / sequences.clamp(min=1))

        before = over(
            torch.cat([i.mask for i in inputs]), torch.cat([i.advantages for i in inputs])
        )
        return BatchShifts(
            before,
            over(
                torch.cat([k.kept for k in self._kept]),
                torch.cat([k.advantages for k in self._kept]),
            ),
        )


def _number_sequences(inputs: list[Inputs]) -> Tensor:
    parts, offset = [], 0
    for i in inputs:
        parts.append(i.sequence + offset)
        offset += i.num_sequences
    return torch.cat(parts)


def _concatenate(supports: list[Support]) -> Support:
    if isinstance(supports[0], TopKSupport):
        return TopKSupport.concatenate([s for s in supports if isinstance(s, TopKSupport)])
    return FullSupport.concatenate([s for s in supports if isinstance(s, FullSupport)])
