# SPDX-License-Identifier: Apache-2.0
"""Every kernel once on random input: what it gives, and the same in float64 from the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.core.kernels import Kernels, choose
from capo_verl.core.kernels.entries import sort_by_row
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.keys import ids_of
from capo_verl.core.logits import LogitRows, VocabShard
from capo_verl.core.support import TopKSupport

BETAS, EPS, STEPS = (0.9, 0.999), 1e-8, 3
TOLERANCE = 1e-4
"""Largest deviation allowed, as a share of the largest number expected: float32 sums in another
order.
"""


class Sizes(NamedTuple):
    """Of a batch and an LM head. The defaults are small, and no multiples of the kernels' tiles."""

    tokens: int = 5
    rows: int = 150
    hidden: int = 300
    k: int = 50


def deviations(device: torch.device) -> dict[str, float]:
    """Output of a Triton kernel -> largest deviation from its twin's in plain torch."""
    inputs = Inputs(Sizes(), device)
    return compare(*(results(choose(device, name), inputs) for name in ("triton", "torch")))


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Output -> largest deviation, as a share of the largest number expected; inf if ids or shapes
    differ.
    """
    return {what: _deviation(found[what], expected[what]) for what in expected}


def _deviation(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu(), expected.cpu()
    if not found.is_floating_point() or found.shape != expected.shape:
        return 0.0 if torch.equal(found, expected) else float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


class Inputs:
    """Random input of the kernels, the same on every device.

    Moments are float32: with bfloat16 ones a sum that is added up in another order may be rounded
    to the other side.
    """

    def __init__(self, sizes: Sizes, device: torch.device):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.sizes = sizes
        self.logits = 3 * draw(sizes.tokens, sizes.rows)
        self.hidden = draw(sizes.tokens, sizes.hidden).bfloat16()
        self.advantages = draw(sizes.tokens)
        self.exp_avg = 0.01 * draw(sizes.rows, sizes.hidden)
        self.exp_avg_sq = 1e-4 * draw(sizes.rows, sizes.hidden).square()

    def moments(self) -> Moments:
        """A copy: kernels write to the moments."""
        steps = torch.tensor(STEPS, device=self.logits.device)
        return Moments(self.exp_avg.clone(), self.exp_avg_sq.clone(), steps, BETAS, EPS, 0)


def results(kernels: Kernels, inputs: Inputs) -> dict[str, Tensor]:
    """Results of the kernels."""
    tokens, rows, hidden_size, k = inputs.sizes
    shard, logits, hidden = VocabShard(rows, rows, 0), inputs.logits, inputs.hidden
    ids = ids_of(kernels.best_keys(LogitRows(logits), k, shard).sort(descending=True).values)
    support = TopKSupport(
        ids,
        logits.gather(1, ids).softmax(-1),
        torch.ones(tokens, dtype=torch.bool, device=logits.device),
        ids[:, 0],
        shard,
    )
    directions = torch.empty(tokens, k, device=logits.device)
    sums = kernels.partial_sums(hidden, inputs.advantages, support, inputs.moments(), directions)
    entries = sort_by_row(ids, inputs.advantages[:, None] * support.v, support.finite, rows)
    touched = entries.counts.nonzero()[:, 0]
    row_sums, added = (
        kernels.row_sums(entries, touched, hidden),
        torch.ones(rows, hidden_size, device=logits.device),
    )
    kernels.add_row_sums(entries, hidden, added)
    moved, updated = inputs.moments(), inputs.moments()
    kernels.move(moved, slice(0, hidden_size), touched, row_sums, entries.counts[touched])
    kernels.update(updated, slice(0, hidden_size), entries, hidden)
    return {
        "best_keys": ids, "partial_sums of the taken token": sums[:, 0],
        "partial_sums mean": sums[:, 1],
        "partial_sums mean square": sums[:, 2], "partial_sums directions": directions,
        "row_sums": row_sums,
        "add_row_sums": added, "move exp_avg": moved.exp_avg, "move exp_avg_sq": moved.exp_avg_sq,
        "update exp_avg": updated.exp_avg, "update exp_avg_sq": updated.exp_avg_sq,
    }  # fmt: skip


def exact(inputs: Inputs) -> dict[str, Tensor]:
    """The same by the oracle (:mod:`capo_verl.commands.measure.oracle`), float64."""
    import numpy as np

    from capo_verl.commands.measure.oracle import Oracle, make_token, support

    _, rows, hidden_size, k = inputs.sizes
    oracle = Oracle(rows, hidden_size, top_k=k, betas=BETAS, eps=EPS, step_count=STEPS)
    oracle.exp_avg, oracle.exp_avg_sq = (
        x.double().cpu().numpy() for x in (inputs.exp_avg, inputs.exp_avg_sq)
    )
    logits, hidden, advantages = (
        x.double().cpu().numpy() for x in (inputs.logits, inputs.hidden, inputs.advantages)
    )
    tokens = [
        make_token(h, z, int(support(z, 1)[0]), a, k)
        for h, z, a in zip(hidden, logits, advantages, strict=True)
    ]
    u = np.array([oracle.precondition(t.rows, t.g) @ t.h for t in tokens])
    pi = np.array([t.pi for t in tokens])
    mean, count = oracle.mean_gradient(tokens)
    sums = mean * count[:, None]
    oracle.update(tokens)
    found = {
        "best_keys": np.array([t.rows for t in tokens]),
        "partial_sums of the taken token": u[:, 0],
        "partial_sums mean": (pi * u).sum(-1), "partial_sums mean square": (pi * u**2).sum(-1),
        "partial_sums directions": u, "row_sums": sums[count > 0], "add_row_sums": 1 + sums,
        **{f"{kernel} {name}": getattr(oracle, name) for kernel in ("move", "update")
           for name in ("exp_avg", "exp_avg_sq")},
    }  # fmt: skip
    return {what: torch.from_numpy(values) for what, values in found.items()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which ``torch.empty`` gives NaN and the largest integers: a place that a kernel
    leaves out is seen.
    """
    settings: Any = torch.utils.deterministic
    strict, filled = (
        torch.are_deterministic_algorithms_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict)
