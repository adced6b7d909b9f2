# SPDX-License-Identifier: Apache-2.0
"""Thresholds at a learning rate that changes: what is rejected depends on the policy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.config import TargetRejection
from capo_verl.core.adaptive_threshold import AdaptiveThreshold
from tests.helpers.batches import Batch

V, H, K, LR, STEPS = 21, 6, 7, 0.02, 6
WARM_UP = [LR * x for x in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
"""As of a KL budget: tenfold from step to step."""
ADAPTIVE: dict[str, Any] = {
    "objective_shift_max": None, "policy_shift_max": {"target_rejection": 0.2, "memory": 0.5},
}  # fmt: skip
FIXED: dict[str, Any] = {
    "objective_shift_max": None, "policy_shift_max": 2e-4, "reference_lr": LR,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    f"{name}_{kind}": {**knobs, **more}
    for name, knobs in (("adaptive", ADAPTIVE), ("fixed", FIXED))
    for kind, more in (
        ("sampled", {}),
        ("exact", {"policy_shift": "exact"}),
        ("sgd", {"optimizer_model": "sgd"}),
        ("sequence", {"granularity": "sequence"}),
        ("soft", {"weighting": "soft"}),
    )
}


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    return [Batch.random(rng, 4, 8, H, V) for _ in range(STEPS)]


def run(config: CapoConfig, rates: list[float]) -> tuple[torch.Tensor, list[float], CapoFilter]:
    """Weights of all steps ``[S, B, T]``, and tau_F / lr^2 of each."""
    capo, weights, thresholds = CapoFilter(config, V, H), [], []
    for batch, rate in zip(batches(), rates, strict=True):
        weights.append(capo.evaluate(*batch.arguments(rate)).trust_weights)
        thresholds.append(float(capo.policy_shift_max or 0.0) / rate**2 if rate else np.inf)
        capo.step()
    return torch.stack(weights), thresholds, capo


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_changes_nothing(name):
    config = CapoConfig(top_k=K, **CASES[name])
    constant, thresholds, capo = run(config, [LR] * STEPS)
    found, warming, warmed = run(config, WARM_UP)
    torch.testing.assert_close(found, constant, rtol=1e-9, atol=0)
    assert 0 < float(found.mean()) < 1
    assert warming == pytest.approx(thresholds, rel=1e-9)
    assert warmed.adaptive_state() == pytest.approx(capo.adaptive_state(), rel=1e-9)


@pytest.mark.parametrize("rate", [0.0, 1e-30])
def test_a_step_that_moves_nothing_rejects_and_teaches_nothing(rate):
    """The first of verl's warm-up has rate 0: m_F is 0, and so would the threshold be."""
    for name in ("adaptive_sgd", "fixed_sgd"):
        config = CapoConfig(top_k=K, **CASES[name])
        rates = [LR, LR, rate, LR, LR, LR]
        found, _, capo = run(config, rates)
        mask = torch.from_numpy(np.stack([b.mask for b in batches()]))
        assert bool((found[2][mask[2]] == 1).all()) and 0 < float(found[3][mask[3]].mean()) < 1
        state = capo.adaptive_state()
        assert state.get("threshold_steps") == (5.0 if name == "adaptive_sgd" else None)


@pytest.mark.parametrize("low", ["symmetric", -1e-3, 0])
def test_the_objective_test_follows_the_rate(low):
    knobs = {"policy_shift_max": None, "objective_shift_max": 5e-3, "objective_shift_min": low}
    batch, kept = batches()[0], []
    for rate in (LR, LR / 7):
        config = CapoConfig(top_k=K, optimizer_model="sgd", reference_lr=LR, **knobs)
        out = CapoFilter(config, V, H).evaluate(*batch.arguments(rate))
        high = 5e-3 * rate / LR
        m = out.objective_shift
        above = m > -high if low == "symmetric" else m >= low * rate / LR
        expected = torch.from_numpy(batch.mask) & (m < high) & above
        assert torch.equal(out.accepted, expected) and 0 < int(expected.sum()) < batch.mask.sum()
        kept.append(out.accepted)
    assert (kept[0] == kept[1]).double().mean() > 0.9  # all but the second-order term


def test_at_its_reference_rate_a_threshold_is_the_one_given():
    plain, meant = (
        CapoFilter(CapoConfig(top_k=K, policy_shift_max=2e-4, reference_lr=at), V, H)
        for at in (None, LR)
    )
    batch = batches()[0]
    outs = [capo.evaluate(*batch.arguments(LR)) for capo in (plain, meant)]
    assert torch.equal(outs[0].accepted, outs[1].accepted)
    assert plain.adaptive_metrics() == {}
    meant.evaluate(*batch.arguments(LR / 10))
    assert float(meant.adaptive_metrics()["capo/policy_threshold"]) == pytest.approx(2e-6)


def test_the_realised_share_is_the_target():
    """Heavy tails, batches of different scale, a drift, and rates of a warm-up, a cosine and a KL
    budget: within a quarter of the target after ten steps.
    """
    for target in (0.01, 0.02, 0.1):
        rng = np.random.default_rng(0)
        tau = AdaptiveThreshold(TargetRejection(target), torch.device("cpu"), ())
        shares = []
        for step in range(80):
            rate = min(1e-7 * 10**step, 3e-4) * (1 + np.cos(np.pi * step / 80))
            scale = 3e3 * np.exp(-step / 8 if step < 8 else step / 30) * rng.lognormal(0, 0.4)
            shifts = torch.from_numpy(scale * rate**2 * rng.pareto(1.5, 256))
            shares.append(float((shifts >= tau.at(rate)).double().mean()))
            tau.add(shifts, torch.ones(256, dtype=torch.bool), rate)
            tau.step(True, torch.float64)
        assert shares[0] == 0.0
        assert np.mean(shares[10:]) == pytest.approx(target, rel=0.25)
        assert np.mean(shares[10:40]) == pytest.approx(target, rel=0.25)
