# SPDX-License-Identifier: Apache-2.0
"""NaN, infinity and contradiction in a mini-batch: noticed on the device, agreed upon by all ranks
before the optimizer steps.

A rank that raised alone would leave the others waiting in their next collective, and a NaN that
only one data-parallel rank saw would reach all weights with the next gradient reduction. So what is
found is only noted while the micro-batches run; one small gather before the optimizer step tells
every rank, and all do the same.

Tensor-parallel ranks decide about the same tokens, each for itself. They decide alike because they
do it after an all-reduce, which gives all of them the same bits, from what all of them were given:
advantages, learning rate, thresholds that come from counts. Beyond that are a rank that is given
something else, and sums in which every rank may have an order of its own: over the tokens of a
sequence on a GPU (granularity ``sequence`` and ``batch``), and of soft weights over data-parallel
ranks (``max_rejection``). A token that only some ranks keep would leave the weights with the
gradient of no loss at all. So a checksum of the decisions travels in the same gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.checksum import checksum
from capo_verl.core.validation import TOKEN_PROBLEMS
from capo_verl.engines.response import masked_values

LOSS_INPUTS = ("old_log_probs", "ref_log_prob", "rollout_is_weights")
"""Fields of a micro-batch which the loss reads beside what the filter sees."""
LOSS, GRADIENTS = "the loss is not finite", "gradients are not finite"
PROBLEMS = (*TOKEN_PROBLEMS, *(f"{name} are not finite" for name in LOSS_INPUTS), LOSS, GRADIENTS)

_NO_SAMPLE = torch.iinfo(torch.int64).max
_SHOWN = 8


class Finding(NamedTuple):
    """One problem on one rank."""

    rank: int
    what: str
    times: int
    """Number of tokens; of the loss, number of micro-batches."""
    sample: int | None
    """Index of the first sample concerned in that rank's share of the mini-batch."""

    def __str__(self) -> str:
        places = f" in {self.times} places" if self.times > 1 else ""
        where = "" if self.sample is None else f", first in sample {self.sample} of its mini-batch"
        return f"rank {self.rank}: {self.what}{places}{where}"


class NonFinite:
    """The problems on this rank since the last :meth:`clear`.

    Args:
        device: where the training runs.
        tp_group: of ranks that decide about the same tokens.
    """

    def __init__(self, device: torch.device, tp_group: collectives.Group = None):
        self._device, self._tp_group = device, tp_group
        self.clear()

    def clear(self) -> None:
        self._count = torch.zeros(len(PROBLEMS), device=self._device, dtype=torch.int64)
        self._sample = torch.full_like(self._count, _NO_SAMPLE)
        self._decisions, self._places = torch.zeros_like(self._count[0]), 0

    def note(self, what: str, bad: Tensor, samples: Tensor | None = None) -> None:
        """Remember ``bad [...]`` bool, concerning ``samples [...]`` int64.

        Does not wait for the device.
        """
        self._note(PROBLEMS.index(what), bad[None], samples)

    def note_tokens(self, problems: Mapping[str, Tensor], samples: Tensor) -> None:
        """Note all of ``TOKEN_PROBLEMS`` of a micro-batch at once, ``[...]`` bool each.

        Does not wait for the device.
        """
        self._note(0, torch.stack([problems[what] for what in TOKEN_PROBLEMS]), samples)

    def note_decisions(self, weights: Tensor) -> None:
        """Note the weights of a micro-batch's tokens, ``[...]`` float32.

        Does not wait for the device.
        """
        self._decisions += checksum(weights.reshape(-1, 1), self._places, None)
        self._places += weights.numel()

    def _note(self, first: int, bad: Tensor, samples: Tensor | None) -> None:
        """``bad [P, ...]``, concerning the problems from ``first`` on."""
        rows = slice(first, first + len(bad))
        self._count[rows] += bad.reshape(len(bad), -1).sum(-1)
        if samples is not None and bad[0].numel():
            concerned = torch.where(bad, samples, _NO_SAMPLE).reshape(len(bad), -1).amin(-1)
            self._sample[rows] = torch.minimum(self._sample[rows], concerned)

    def note_loss(self, loss: Tensor, data: TensorDict, samples: Tensor) -> None:
        """Note the loss of a micro-batch and its inputs. ``samples [b]`` int64."""
        for name in LOSS_INPUTS:
            if data.get(name, None) is not None:
                values, of = masked_values(data, name)
                self.note(f"{name} are not finite", ~values.isfinite(), samples[of])
        self.note(LOSS, ~loss.detach().isfinite().reshape(1), samples.min().reshape(1))

    def note_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Note this rank's gradients; a norm that overflows could not be clipped, and counts."""
        norm = torch.nn.utils.get_total_norm(list(gradients))
        self.note(GRADIENTS, ~norm.isfinite().to(self._device))

    def agree(self, group: collectives.Group) -> list[Finding]:
        """The findings of all ranks of ``group``, the same list on each; empty if all is well.

        What is not finite may be why ranks disagree, and hides that. Collective.

        Args:
            group: all ranks, or None for one process.
        """
        tp_group = self._tp_group
        first = collectives.rank(group) if tp_group is None else dist.get_global_rank(tp_group, 0)
        decided = torch.stack((self._decisions, torch.full_like(self._decisions, first)))
        noted = torch.stack((self._count, self._sample), dim=-1)
        gathered = collectives.gather(torch.cat((decided[None], noted)).flatten(), group)
        table = gathered.view(-1, 1 + len(PROBLEMS), 2).tolist()
        found = [
            Finding(rank, what, count, None if sample == _NO_SAMPLE else sample)
            for rank, (_, *rows) in enumerate(table)
            for what, (count, sample) in zip(PROBLEMS, rows, strict=True)
            if count
        ]
        return found or [
            Finding(rank, _contradicts(like), 1, None)
            for rank, ((decisions, like), *_) in enumerate(table)
            if decisions != table[like][0][0]
        ]


def _contradicts(rank: int) -> str:
    return f"decisions about tokens are not those of rank {rank}, which has the same tokens"


def describe(findings: list[Finding], step: int) -> str:
    """A sentence for logs and errors: problem, rank, sample and optimizer step."""
    shown = "; ".join(str(finding) for finding in findings[:_SHOWN])
    more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
    return f"optimizer step {step} is not usable: {shown}{more}"
