# SPDX-License-Identifier: Apache-2.0
"""The tiny tier's losses: the plain one is verl's, and every other one can be asked for."""

from __future__ import annotations

import pytest
import torch

from capo_verl.experiments.study.config import RunConfig
from capo_verl.experiments.study.objective import Batch, policy_loss
from capo_verl.rivals import RIVALS
from tests.experiments.study.conftest import small
from tests.experiments.study.test_loop import fresh, rollout_of

VERL = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "cispo",
)


def batch(ratio: float = 0.0) -> Batch:
    """Two groups of three; ``ratio``: spread of the log-ratios."""
    random = torch.Generator().manual_seed(0)
    shape = (6, 5)
    old = -torch.rand(shape, generator=random) - 0.1
    new = (old + ratio * torch.randn(shape, generator=random)).requires_grad_()
    mask = torch.rand(shape, generator=random) < 0.8
    trained = mask & (torch.rand(shape, generator=random) < 0.8)
    advantages = torch.randn(6, 1, generator=random).expand(shape)
    tokens = torch.randint(8, shape, generator=random)
    return Batch(
        old,
        new,
        advantages,
        trained,
        mask,
        torch.rand(shape, generator=random),
        torch.arange(2).repeat_interleave(3),
        tokens,
    )


def gradient(config: RunConfig, of: Batch, epoch: int = 0) -> torch.Tensor:
    of.log_prob.grad = None
    policy_loss(config, of, epoch).backward()
    assert of.log_prob.grad is not None
    return of.log_prob.grad.clone()


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_plain_loss_is_verls(aggregation):
    """Also where tokens are filtered: the denominators are those of verl's engines."""
    pytest.importorskip("verl")
    for spread, knobs in (
        (0.0, {}),
        (0.3, {"clip_ratio_low": 50.0, "clip_ratio_high": 50.0, "clip_ratio_c": 1e6}),
    ):
        of = batch(spread)
        plain = gradient(small(aggregation=aggregation), of)
        verls = gradient(small(aggregation=aggregation, loss="verl:vanilla", loss_knobs=knobs), of)
        torch.testing.assert_close(plain, verls)
        assert plain[of.mask].ne(0).all() and plain[~of.mask].eq(0).all()


def test_clipping_is_felt():
    pytest.importorskip("verl")
    of = batch(0.3)
    tight = {"clip_ratio": 0.05, "clip_ratio_low": 0.05, "clip_ratio_high": 0.05}
    loose, clipped = (gradient(small(loss="verl:vanilla", loss_knobs=k), of) for k in ({}, tight))
    assert clipped.eq(0).sum() > loose.eq(0).sum()


@pytest.mark.parametrize("loss", [*RIVALS, *(f"verl:{name}" for name in VERL)])
def test_every_loss_takes_a_step(loss):
    if loss.startswith("verl:"):
        pytest.importorskip("verl")
    from capo_verl.experiments.study.stepper import Stepper

    # GTPO leaves out groups of high entropy, and this policy is random; BNPO takes rewards.
    knobs = {
        "gtpo": {"entropy_max": None}, "lopti": {"part": "low"},
        "bnpo": {"reward_min": -9.0, "reward_max": 9.0},
    }.get(loss, {})  # fmt: skip
    config = small(loss=loss, loss_knobs=knobs, mini_batches=2, lr=1e-2, warmup=1)
    model, task = fresh(config)
    before = model.flat.detach().clone()
    measured = list(Stepper(config, model).update(rollout_of(config, task, model)))
    assert len(measured) == 2 and all(float(m["grad_norm"]) > 0 for m in measured)
    assert torch.isfinite(model.flat).all() and not torch.equal(model.flat, before)


def test_lopti_trains_on_all_tokens_in_two_epochs():
    with pytest.raises(ValueError, match="epochs=1: loss=lopti trains on half of the tokens"):
        small(loss="lopti")
    config, of = small(loss="lopti", epochs=2), batch()
    trained = [gradient(config, of, epoch).ne(0) for epoch in range(2)]
    assert not (trained[0] & trained[1]).any() and torch.equal(trained[0] | trained[1], of.mask)


@pytest.mark.parametrize(
    ("loss", "knobs", "message"),
    [
        ("nothing", {}, "loss='nothing'"),
        ("verl:vanilla", {"clip": 1}, "loss_knobs.clip is no field"),
        ("dcpo", {"clip": 1}, "clip"),
    ],
)
def test_unknown_losses_and_knobs_are_named(loss, knobs, message):
    if loss.startswith("verl:"):
        pytest.importorskip("verl")
    with pytest.raises(ValueError, match=message):
        policy_loss(small(loss=loss, loss_knobs=knobs), batch())
