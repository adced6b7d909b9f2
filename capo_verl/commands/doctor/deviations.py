# SPDX-License-Identifier: Apache-2.0
"""Every kernel once in Triton and once in plain torch, on the same random input."""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.core.kernels import Kernels, choose
from capo_verl.core.kernels.entries import sort_by_row
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.keys import ids_of
from capo_verl.core.logits import LogitRows, VocabShard
from capo_verl.core.support import TopKSupport

TOKENS, ROWS, HIDDEN, K = 5, 150, 300, 50
"""Small, and no multiples of the kernels' tiles."""
TOLERANCE = 1e-4
"""Largest deviation allowed, as a share of the largest number expected: float32 sums in another
order.
"""


def deviations(device: torch.device) -> dict[str, float]:
    """Output of a kernel -> largest deviation from its twin's, as a share of the largest number of
    that; inf if ids or shapes differ.

    Moments are float32: with bfloat16 ones a sum that is added up in another order may be rounded
    to the other side.
    """
    found, expected = (_results(choose(device, name), device) for name in ("triton", "torch"))
    return {what: _deviation(found[what], expected[what]) for what in expected}


def _deviation(found: Tensor, expected: Tensor) -> float:
    if not found.is_floating_point() or found.shape != expected.shape:
        return 0.0 if torch.equal(found, expected) else float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def _results(kernels: Kernels, device: torch.device) -> dict[str, Tensor]:
    """Inputs are drawn anew, from the same seed: kernels write to the moments."""
    draw = _Draw(device)
    shard, logits, hidden = (
        VocabShard(ROWS, ROWS, 0),
        3 * draw(TOKENS, ROWS),
        draw(TOKENS, HIDDEN).bfloat16(),
    )
    ids = ids_of(kernels.best_keys(LogitRows(logits), K, shard).sort(descending=True).values)
    support = TopKSupport(
        ids,
        logits.gather(1, ids).softmax(-1),
        torch.ones(TOKENS, dtype=torch.bool, device=device),
        ids[:, 0],
        shard,
    )
    advantages = draw(TOKENS)
    directions = torch.empty(TOKENS, K, device=device)
    sums = kernels.partial_sums(hidden, advantages, support, draw.moments(), directions)
    entries = sort_by_row(ids, advantages[:, None] * support.v, support.finite, ROWS)
    touched = entries.counts.nonzero()[:, 0]
    row_sums, added = (
        kernels.row_sums(entries, touched, hidden),
        torch.ones(ROWS, HIDDEN, device=device),
    )
    kernels.add_row_sums(entries, hidden, added)
    moved, updated = draw.moments(), draw.moments()
    kernels.move(moved, slice(0, HIDDEN), touched, row_sums, entries.counts[touched])
    kernels.update(updated, slice(0, HIDDEN), entries, hidden)
    return {
        "best_keys": ids, "partial_sums of the taken token": sums[:, 0],
        "partial_sums mean": sums[:, 1],
        "partial_sums mean square": sums[:, 2], "partial_sums directions": directions,
        "row_sums": row_sums,
        "add_row_sums": added, "move exp_avg": moved.exp_avg, "move exp_avg_sq": moved.exp_avg_sq,
        "update exp_avg": updated.exp_avg, "update exp_avg_sq": updated.exp_avg_sq,
    }  # fmt: skip


class _Draw:
    """Random numbers that are the same on every device."""

    def __init__(self, device: torch.device):
        self._generator, self._device = torch.Generator().manual_seed(0), device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device)

    def moments(self) -> Moments:
        steps = torch.tensor(3, device=self._device)
        return Moments(
            0.01 * self(ROWS, HIDDEN),
            1e-4 * self(ROWS, HIDDEN).square(),
            steps,
            (0.9, 0.999),
            1e-8,
            0,
        )
