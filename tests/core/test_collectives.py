# SPDX-License-Identifier: Apache-2.0
"""What CAPO communicates, counted call by call on real process groups.

The formulas are those of docs/parallelism.md.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import accepted
from tests.helpers.spawn import run_on_ranks

H, LR = 6, 0.02


class Call(NamedTuple):
    """One collective as one rank issues it: the bytes are those of its own tensor."""

    operation: str
    bytes: int
    group: str


def count(
    tokens: int,
    vocab_size: int,
    top_k: int | None,
    micro_batches: int = 1,
    scratch: int = 1 << 24,
    granule: int = 64,
) -> dict:
    """What one of four ranks, TP2 x DP2, communicates for a mini-batch."""
    rank = dist.get_rank()
    tp = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    dp = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    names = {tp: "tp", dp: "dp"}
    calls: list[Call] = []

    def recorded(name, original):
        def call(*args, **kwargs):
            x = args[1] if name == "all_gather" else args[0]
            calls.append(Call(name, x.nbytes, names[kwargs["group"]]))
            return original(*args, **kwargs)

        return call

    collectives = ("all_", "reduce", "broadcast", "gather", "scatter")
    originals = {name: getattr(dist, name) for name in dir(dist) if name.startswith(collectives)}
    originals = {name: original for name, original in originals.items() if callable(original)}
    for name, original in originals.items():
        setattr(dist, name, recorded(name, original))
    accepted.SCRATCH_ELEMENTS, accepted.COLUMNS = scratch, granule
    try:
        config = CapoConfig(
            top_k=top_k, policy_shift_max=None, objective_shift_max=None, batch_shift_tokens=0
        )
        capo = CapoFilter(config, vocab_size, H, tp_group=tp, dp_group=dp)
        generator = torch.Generator().manual_seed(rank // 2)
        for _ in range(micro_batches):
            logits = torch.randn(1, tokens, vocab_size, generator=generator)
            actions = torch.randint(vocab_size, (1, tokens), generator=generator)
            hidden = torch.randn(1, tokens, H, generator=generator)
            mine = logits[..., capo.shard.start : capo.shard.start + capo.shard.rows]
            capo.evaluate(hidden, mine, actions, torch.ones(1, tokens), torch.ones(1, tokens), LR)
        evaluated = list(calls)
        calls.clear()
        capo.step()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    moved = (capo.state_dict()["exp_avg"] != 0).any(-1)
    return {"evaluate": evaluated, "step": list(calls), "union": int(moved.sum())}


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "micro_batches"), [(5, 32, 1), (10, 32, 1), (5, 640, 2)]
)
def test_top_k_counts_and_bytes(tokens, vocab_size, micro_batches):
    k = 4
    for rank in run_on_ranks(count, 4, tokens, vocab_size, k, micro_batches):
        per_micro_batch = [
            Call("all_gather", tokens * k * 8, "tp"),
            Call("all_reduce", tokens * 3 * 4, "tp"),
        ]
        assert rank["evaluate"] == per_micro_batch * micro_batches
        # Rows of the union that some rank touched, not those of the vocabulary.
        assert (
            0 < rank["union"] <= 2 * tokens * k * micro_batches and rank["union"] < vocab_size // 2
        )
        assert rank["step"] == [
            Call("all_reduce", (vocab_size // 2 + 1) * 8, "dp"),
            Call("all_reduce", rank["union"] * H * 4, "dp"),
        ]


def test_whole_vocabulary_needs_a_normaliser_only():
    tokens = 7
    for rank in run_on_ranks(count, 4, tokens, 32, None):
        assert rank["evaluate"] == [
            Call("all_gather", tokens * 2 * 4, "tp"),
            Call("all_reduce", tokens * 3 * 4, "tp"),
        ]
        assert rank["union"] == 16


def test_more_than_fits_is_reduced_some_columns_at_a_time():
    for rank in run_on_ranks(count, 4, 7, 32, None, scratch=2 * 16, granule=1):
        assert [call.bytes for call in rank["step"][1:]] == [16 * 2 * 4] * 3


def uneven(
    tokens: list[int], scratch: int, fold_at: int, top_k: int | None, tau: float | None
) -> dict:
    """A step of two data-parallel ranks with so many tokens each; the number of reductions, and the
    moments.
    """
    rank = dist.get_rank()
    accepted.SCRATCH_ELEMENTS, accepted.COLUMNS = scratch, 2
    accepted.fold_limit = lambda rows, hidden_size: fold_at
    capo = CapoFilter(
        CapoConfig(top_k=top_k, policy_shift_max=tau, objective_shift_max=None),
        24,
        H,
        dp_group=dist.group.WORLD,
    )
    generator = torch.Generator().manual_seed(5)
    n, first = sum(tokens), sum(tokens[:rank])
    hidden, logits = (torch.randn(n, x, generator=generator) for x in (H, 24))
    actions = torch.randint(24, (n,), generator=generator)
    at = slice(first, first + tokens[rank])
    if tokens[rank]:
        ones = torch.ones(tokens[rank])
        capo.evaluate(hidden[at], logits[at], actions[at], ones, ones, LR)
    capo.step()
    dist.all_reduce(torch.ones(1))  # whatever the trainer does next
    whole = CapoFilter(
        CapoConfig(top_k=top_k, policy_shift_max=tau, objective_shift_max=None), 24, H
    )
    whole.evaluate(hidden, logits, actions, torch.ones(n), torch.ones(n), LR)
    whole.step()
    return {"mine": capo.state_dict(), "whole": whole.state_dict()}


@pytest.mark.parametrize("tokens", [[40, 2], [9, 0], [0, 5]], ids=str)
@pytest.mark.parametrize(
    "fold_at", [1 << 40, 0, 40 * H], ids=["kept", "folded", "folded on one rank"]
)
@pytest.mark.parametrize(
    ("top_k", "tau"),
    [(4, None), (None, None), (4, 1e-30)],
    ids=["top 4", "all", "nothing accepted"],
)
def test_ranks_with_unequal_tokens_reduce_alike(tokens, fold_at, top_k, tau):
    for rank in run_on_ranks(uneven, 2, tokens, 48, fold_at, top_k, tau):
        assert rank["mine"]["step"] == rank["whole"]["step"] == (0 if tau else 1)
        for name in ("exp_avg", "exp_avg_sq"):
            assert bool(rank["whole"][name].any()) != bool(tau)
            torch.testing.assert_close(
                rank["mine"][name], rank["whole"][name], rtol=1e-5, atol=1e-8
            )
