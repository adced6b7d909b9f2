# SPDX-License-Identifier: Apache-2.0
"""One recorded batch on real process groups: tensor-, data- and context-parallel ranks decide as
one process does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from capo_verl import CapoConfig, CapoFilter
from tests.helpers.batches import Batch
from tests.helpers.layouts import make_groups
from tests.helpers.spawn import run_on_ranks

V, H, LR, STEPS = 21, 6, 0.02, 3  # 21 rows: the last tensor-parallel rank holds padding


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    return [Batch.random(rng, 4, 8, H, V, ties=True) for _ in range(STEPS)]


def run(config: CapoConfig, tp: int, dp: int, cp: int) -> dict:
    """This rank's share of the batches; returns what it saw, with its place in the layout."""
    at, groups = make_groups(tp, dp, cp)
    capo = CapoFilter(config, V, H, **groups)
    rows, start = capo.shard.rows, capo.shard.start
    seen = []
    for batch in batches():
        hidden, logits, *rest = batch.arguments(LR)
        logits = torch.nn.functional.pad(logits, (0, rows * tp - V), value=99.0)[
            ..., start : start + rows
        ]
        sequences = slice(at.dp * 4 // dp, (at.dp + 1) * 4 // dp)
        time = slice(at.cp * 8 // cp, (at.cp + 1) * 8 // cp)
        out = capo.evaluate(*(x[sequences, time] for x in (hidden, logits, *rest[:-1])), LR)
        shifts = capo.batch_shifts()
        capo.step()
        seen.append(
            {
                "m_h": out.objective_shift, "m_f": out.policy_shift, "accepted": out.accepted,
                "batch": [float(x) for pair in shifts for x in pair],
            }
        )  # fmt: skip
    return {"at": at, "steps": seen, "state": capo.state_dict()}


@pytest.mark.parametrize(
    "layout", [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)], ids=str
)
@pytest.mark.parametrize(
    "knobs",
    [{"top_k": 5}, {"top_k": 15}, {"top_k": None}, {"top_k": 5, "optimizer_model": "sgd"}],
    ids=str,
)
def test_every_layout_decides_alike(layout, knobs):
    sgd = "optimizer_model" in knobs
    config = CapoConfig(
        policy_shift_max=3e-5 if sgd else 3e-4, objective_shift_max=0.01 if sgd else 0.05, **knobs
    )
    tp, dp, cp = layout
    one = run(config, 1, 1, 1)
    rejected = [
        int((torch.from_numpy(b.mask) & ~s["accepted"]).sum())
        for b, s in zip(batches(), one["steps"], strict=True)
    ]
    assert min(rejected) > 0 and all(s["accepted"].any() for s in one["steps"])
    for result in run_on_ranks(run, tp * dp * cp, config, tp, dp, cp):
        at = result["at"]
        for mine, whole in zip(result["steps"], one["steps"], strict=True):
            for name in ("m_h", "m_f", "accepted"):
                share = whole[name].chunk(dp, 0)[at.dp].chunk(cp, 1)[at.cp]
                torch.testing.assert_close(mine[name], share, rtol=1e-11, atol=1e-16)
            assert mine["batch"] == pytest.approx(whole["batch"], rel=1e-11)
        if config.optimizer_model == "adam":
            rows = -(-V // tp)
            for name in ("exp_avg", "exp_avg_sq"):
                whole = one["state"][name][at.tp * rows : (at.tp + 1) * rows]
                mine = result["state"][name]
                torch.testing.assert_close(mine[: len(whole)], whole, rtol=1e-11, atol=1e-16)
                assert not mine[len(whole) :].any()
            assert result["state"]["step"] == STEPS


def bad_logits_on_one_rank() -> str:
    rank = dist.get_rank()
    capo = CapoFilter(CapoConfig(top_k=3), 8, 2, tp_group=dist.group.WORLD)
    logits = torch.zeros(1, 2, 4)
    if rank == 1:
        logits[0, 1, 2] = float("nan")
    with pytest.raises(ValueError) as error:
        capo.evaluate(
            torch.ones(1, 2, 2),
            logits,
            torch.zeros(1, 2, dtype=torch.int64),
            torch.ones(1, 2),
            torch.ones(1, 2),
            0.1,
        )
    return str(error.value)


def test_non_finite_logits_on_one_rank_raise_on_all():
    messages = run_on_ranks(bad_logits_on_one_rank, 2)
    assert messages == ["logits are not finite at 1 of 2 response tokens: position (0, 1)"] * 2


def sequences_over_context_parallel() -> str:
    with pytest.raises(ValueError) as error:
        CapoFilter(CapoConfig(top_k=3, granularity="sequence"), 8, 2, cp_group=dist.group.WORLD)
    return str(error.value)


def test_sequences_cut_by_context_parallelism_are_refused():
    assert (
        "context parallelism of size 2 splits them"
        in run_on_ranks(sequences_over_context_parallel, 2)[0]
    )
