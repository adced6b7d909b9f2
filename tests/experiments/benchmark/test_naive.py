# SPDX-License-Identifier: Apache-2.0
"""The naive contender is the method: float64 numbers of the oracle over several steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from capo_verl import CapoConfig
from capo_verl.commands.measure.naive import BATCH_TOKENS, NaiveFilter
from tests.helpers.batches import Batch, inside
from tests.helpers.oracle import Oracle, make_token

V, H, K, N, LR = 40, 12, 6, 30, 0.05
CONFIG = CapoConfig(
    top_k=K, policy_shift_max=2e-3, objective_shift_max=5e-2, betas=(0.8, 0.95), eps=1e-6
)


REUSE = pytest.mark.parametrize("reuse", [False, True], ids=["as published", "temporaries reused"])


@REUSE
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, objective_shift_min=0.0, policy_shift_max=None)]
)
def test_shifts_decisions_and_moments_over_four_steps(config, batches, reuse):
    rng = np.random.default_rng(0)
    naive = NaiveFilter(config, V, H, device="cpu", dtype=torch.float64, reuse_temporaries=reuse)
    oracle = Oracle(V, H, top_k=K, betas=config.betas, eps=config.eps)
    kept = 0
    for _ in range(4):
        batch = Batch.random(rng, 1, N, H, V)
        *tensors, lr = batch.arguments(LR)
        parts = []
        for part in zip(*(x[0].tensor_split(batches) for x in tensors), strict=True):
            parts.append(naive.evaluate(*part, lr))
            naive.accumulate()
        naive.update()
        objective_shift, policy_shift, decision = (torch.cat(x) for x in zip(*parts, strict=True))

        tokens = batch.tokens(K)[0]
        expected = np.array([oracle.token_shifts(token, LR) for token in tokens])
        accepted = np.array([inside(config, *shifts) for shifts in expected]) & batch.mask[0]
        np.testing.assert_allclose(objective_shift, expected[:, 0], rtol=1e-10, atol=1e-16)
        np.testing.assert_allclose(policy_shift, expected[:, 1], rtol=1e-10, atol=1e-16)
        np.testing.assert_array_equal(decision, accepted)
        oracle.update([token for token, ok in zip(tokens, accepted, strict=True) if ok])
        state = naive.state_dict()
        assert state["step"] == oracle.step_count
        np.testing.assert_allclose(state["exp_avg"], oracle.exp_avg, rtol=1e-10, atol=1e-16)
        np.testing.assert_allclose(state["exp_avg_sq"], oracle.exp_avg_sq, rtol=1e-10, atol=1e-16)
        kept += accepted.sum()
    assert (
        0 < kept < 4 * batch.mask.sum() and oracle.step_count > 1
    )  # both outcomes, and P(g) != g, were seen


@REUSE
def test_nothing_accepted_moves_nothing(reuse):
    config = replace(CONFIG, policy_shift_max=1e-30)
    naive = NaiveFilter(config, V, H, device="cpu", dtype=torch.float64, reuse_temporaries=reuse)
    *tensors, lr = Batch.random(np.random.default_rng(1), 1, N, H, V).arguments(LR)
    tensors[3] = torch.ones_like(tensors[3])
    assert not naive.evaluate(*(x[0] for x in tensors), lr).accepted.any()
    naive.accumulate()
    naive.update()
    assert naive.step_count == 0 and not naive.exp_avg.any() and not naive.exp_avg_sq.any()


@REUSE
def test_float32_inputs_in_a_float32_filter_stay_close_to_float64(reuse):
    batch = Batch.random(np.random.default_rng(2), 1, N, H, V)
    *tensors, lr = batch.arguments(LR, torch.float32)
    naive = NaiveFilter(CONFIG, V, H, device="cpu", dtype=torch.float32, reuse_temporaries=reuse)
    out = naive.evaluate(*(x[0] for x in tensors), lr)
    assert out.policy_shift.dtype == torch.float32
    exact = [
        Oracle(V, H, top_k=K).token_shifts(
            make_token(
                batch.hidden[0, i],
                batch.logits[0, i],
                batch.actions[0, i],
                batch.advantages[0, i],
                K,
            ),
            LR,
        )
        for i in range(N)
    ]
    np.testing.assert_allclose(out.policy_shift, [m_f for _, m_f in exact], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("reuse", "tensors"), [(False, 7), (True, 4)])
def test_the_tensors_of_the_papers_batch(reuse, tensors):
    # 24 x 1024 tokens of a 7B model in bfloat16: 8.8 GB each. More tokens are several batches, one
    # after the other.
    whole, more, half = (
        NaiveFilter.nbytes(n, 50, 3584, torch.bfloat16, reuse)
        for n in (BATCH_TOKENS, 65536, BATCH_TOKENS // 2)
    )
    assert whole == more == 2 * half == tensors * 8_808_038_400
