# SPDX-License-Identifier: Apache-2.0
"""The reported numbers against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.metrics import StepMetrics
from tests.helpers.batches import Batch
from tests.helpers.spawn import run_on_ranks
from tests.helpers.syncs import recorded_syncs

CONFIG = CapoConfig(
    top_k=6, policy_shift_max=3e-5, objective_shift_max=6e-3, granularity=("token", "sequence")
)


def compute(parts: int, dp_group: object = None) -> dict[str, float]:
    """Metrics of one batch of six sequences, cut into micro-batches; this rank's half of it if
    there is a group.
    """
    capo, metrics = CapoFilter(CONFIG, 20, 5), StepMetrics(dp_group=dp_group)
    batch = Batch.random(np.random.default_rng(1), 6, 7, 5, 20)
    batch.mask[3] = False  # a sequence without response tokens is not an emptied one
    rows = (
        np.array_split(np.arange(6), 2)[dist.get_rank()] if dp_group is not None else np.arange(6)
    )
    for chosen in np.array_split(rows, parts):
        *tensors, lr = batch.arguments(0.02)
        arguments = [x[torch.from_numpy(chosen)] for x in tensors]
        out = capo.evaluate(*arguments, lr)
        ids = torch.arange(len(chosen)).repeat_interleave(7)
        metrics.add(out, arguments[3], arguments[4], ids, len(chosen))
    return metrics.compute()


def test_against_counting():
    batch = Batch.random(np.random.default_rng(1), 6, 7, 5, 20)
    batch.mask[3] = False
    out = CapoFilter(CONFIG, 20, 5).evaluate(*batch.arguments(0.02))
    mask, kept = batch.mask, out.accepted.numpy()
    token = out.stages[0]
    m_f, m_h = token.policy_shift.numpy()[mask], token.objective_shift.numpy()[mask]
    up, down = mask & (batch.advantages > 0), mask & (batch.advantages < 0)
    expected = {
        "rejection_rate": 1 - kept.sum() / mask.sum(),
        "rejection_rate_positive_advantage": (up & ~kept).sum() / up.sum(),
        "rejection_rate_negative_advantage": (down & ~kept).sum() / down.sum(),
        "outside_support": 1 - out.in_support.numpy()[mask].mean(),
        "sequences_emptied": (mask.any(1) & ~kept.any(1)).sum(),
        "accepted_tokens": kept.sum(),
        "nothing_accepted": 0.0,
        "policy_shift_mean": m_f.mean(),
        "policy_shift_max": m_f.max(),
        "policy_shift_p90": np.quantile(m_f, 0.9, method="nearest"),
        "objective_shift_mean": m_h.mean(),
        "objective_shift_min": m_h.min(),
        "objective_shift_p50": np.sort(m_h)[round(0.5 * (len(m_h) - 1))],
    }  # fmt: skip
    assert 0 < expected["rejection_rate"] < 1
    assert expected["sequences_emptied"] == 1
    for parts in (1, 3):
        found = compute(parts)
        for name, value in expected.items():
            assert found[f"capo/{name}"] == pytest.approx(value, rel=1e-9), name
        assert (
            found["capo/rejection_rate_objective_test"] + found["capo/rejection_rate_policy_test"]
            >= found["capo/rejection_rate"]
        )


def test_waits_for_the_device_once():
    """Adding a micro-batch never, computing for the one transfer; what the caller adds to it comes
    back unchanged.
    """
    capo, metrics = CapoFilter(CONFIG, 20, 5), StepMetrics()
    *tensors, lr = Batch.random(np.random.default_rng(1), 6, 7, 5, 20).arguments(0.02)
    out, ids = capo.evaluate(*tensors, lr), torch.arange(6).repeat_interleave(7)
    further = {
        "capo/batch": torch.tensor(0.1, dtype=torch.float64),
        "capo/other": torch.tensor(0.1),
    }
    with recorded_syncs() as syncs:
        for _ in range(2):
            metrics.add(out, tensors[3], tensors[4], ids, 6)
        assert syncs == []
        found = metrics.compute(further)
    assert [sync.operation for sync in syncs] == ["tolist"]
    assert found["capo/batch"] == 0.1 and found["capo/other"] == float(np.float32(0.1))
    assert found.keys() - further.keys() == metrics.compute().keys()


def on_ranks() -> dict[str, float]:
    return compute(1, dist.group.WORLD)


def test_data_parallel_ranks_report_the_whole_batch():
    whole = compute(2)
    for found in run_on_ranks(on_ranks, 2):
        assert found.keys() == whole.keys()
        assert list(found.values()) == pytest.approx(list(whole.values()), rel=1e-12)


def test_nothing_accepted_and_no_tokens():
    batch = Batch.random(np.random.default_rng(2), 2, 3, 4, 10)
    batch.mask[:] = True
    batch.advantages[:] = 1.0
    for masked, expected in ((False, 2.0), (True, 0.0)):
        capo, metrics = (
            CapoFilter(CapoConfig(top_k=4, policy_shift_max=1e-30), 10, 4),
            StepMetrics(),
        )
        if masked:
            batch.mask[:] = False
        *tensors, lr = batch.arguments(0.02)
        metrics.add(
            capo.evaluate(*tensors, lr), tensors[3], tensors[4], torch.tensor([0, 0, 0, 1, 1, 1]), 2
        )
        found = metrics.compute()
        assert found["capo/nothing_accepted"] == 1.0
        assert found["capo/sequences_emptied"] == expected
        assert found["capo/accepted_tokens"] == 0.0
        assert all(map(math.isfinite, found.values()))
