# SPDX-License-Identifier: Apache-2.0
"""Every rival's losses and gradients against loops over tokens in Python's floats."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from capo_verl.rivals import RIVALS
from capo_verl.rivals.bapo import balanced_bounds
from capo_verl.rivals.entropy_mask import highest_entropy
from capo_verl.rivals.gtpo import conflict_weights
from tests.helpers.syncs import recorded_syncs
from tests.rivals import naive
from tests.rivals.naive import Case

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in RIVALS],
    ("entropy_mask", {"top_share": 0.35, "normalise_by": "all"}),
    ("entropy_mask", {"top_share": 1.0, "clip_low": 0.5, "dual_clip": 2.0}),
    ("lopti", {"part": "high", "alpha": 0.3}),
    ("lopti", {"part": "both", "eta": 0.1}),
    ("advantage_reweighting", {"alpha": 1.0}),
    ("dcpo", {"eps_low": 0.01, "eps_high": 0.02, "ratio_max": 1.5}),
    ("bapo", {"target": 0.9, "high_max": 4.0, "high_step": 0.35}),
    ("bapo", {"target": 0.0}),
    ("bapo", {"target": 100.0, "low_step": 0.04}),
    ("aspo", {"clip_low": 0.9, "clip_high": 9.0, "dual_clip": 1.3}),
    ("cpgd", {"drift": 0.5, "drift_cap": 0.4}),
    ("spo", {"epsilon": 1.7}),
    ("pspo", {"alpha": 0.6}),
    ("minpro", {"weight_max": 0.8}),
    ("gtpo", {"entropy_max": None, "conflict_weight": 3.0}),
    ("gtpo", {"entropy_max": 1.0, "divide_by_conflicts": True}),
    *[("rpg", {"kl": kl, "kl_coef": 0.3}) for kl in ("fkl", "rkl", "ufkl", "urkl")],
    ("rpg", {"clip_low": 0.9, "clip_high": 2.0, "dual_clip": 1.5}),
    ("bnpo", {"reward_min": -2.0, "reward_max": 2.5, "weight_max": 0.9}),
    ("empg", {"k": 3.0, "k_future": 0.2, "zeta": 0.7}),
    ("empg", {"k": 0.0, "zeta": 0.0}),
    ("d3s", {"progress": 0.5}),
    ("d3s", {"progress": 1.0, "top_share_end": 0.7, "sample_share_end": 0.8}),
    ("d3s", {"sample_share": 1.0, "top_share": 1.0}),
    ("pacs", {"beta": 0.2}),
    ("pacs", {"balance": False}),
]
WHOLE_GROUPS = [name for name, rival in RIVALS.items() if rival.whole_groups]
REWARDS = {"reward_min": -1.5, "reward_max": 2.0}  # of Case.random, for BNPO


def inputs_of(case: Case, name: str) -> dict[str, Any]:
    all_inputs = {
        "entropy": torch.tensor(case.entropy), "tokens": torch.tensor(case.tokens),
        "group": torch.tensor(case.group), "epoch": 0,
    }  # fmt: skip
    return {key: all_inputs[key] for key in RIVALS[name].needs}


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    old, new, advantages = (
        torch.tensor(x, dtype=dtype) for x in (case.old, case.new, case.advantages)
    )
    return [old, new.requires_grad_(), advantages, torch.tensor(case.mask)]


@pytest.mark.parametrize(
    ("name", "knobs"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x))
)
@pytest.mark.parametrize("seed", [0, 1, 3, 10])
def test_losses_and_gradients(name, knobs, seed):
    case = Case.random(seed)
    if name == "bnpo":
        knobs = {**REWARDS, **knobs}
    elif name == "d3s":  # no ties, among which it would choose by position
        case.advantages += 0.01 * np.arange(len(case.advantages))[:, None]
    old, new, advantages, mask = tensors(case)
    losses, metrics = RIVALS[name](old, new, advantages, mask, **inputs_of(case, name), **knobs)
    assert losses.shape == new.shape and losses.dtype == torch.float64
    assert all(
        value.ndim == 0 and not value.requires_grad and value.isfinite()
        for value in metrics.values()
    )
    loss, gradient = getattr(naive, name)(case, **{**RIVALS[name].knobs, **knobs})
    kept = losses * mask
    kept.sum().backward()
    np.testing.assert_allclose(kept.detach(), loss, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(new.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RIVALS)
def test_on_policy_they_are_the_policy_gradient_with_their_own_weights(name):
    """At ratio 1 nothing is clipped: the gradient is -A times a weight which each paper states."""
    case = Case.random(7)
    case.new = case.old.copy()
    old, new, advantages, mask = tensors(case)
    knobs: dict[str, Any] = {}
    if name == "entropy_mask":
        knobs = {"top_share": 1.0}
    elif name == "lopti":
        knobs = {"part": "both"}
    elif name == "gtpo":
        knobs = {"entropy_max": None, "conflict_weight": 1.0}
    elif name == "bnpo":
        knobs = REWARDS
    elif name == "d3s":
        knobs = {"progress": 1.0}
    losses, metrics = RIVALS[name](old, new, advantages, mask, **inputs_of(case, name), **knobs)
    (losses * mask).sum().backward()
    weight = torch.ones_like(advantages)
    if name == "advantage_reweighting":
        weight = 0.3 * old.exp() + 0.7
    elif name == "pspo":
        weight = weight * 0.9
    elif name == "gtpo":
        weight = torch.tensor(naive.gtpo_weights(case, 1.0)[0])
    elif name in ("bnpo", "empg", "pacs"):  # another advantage
        own = -getattr(naive, name)(case, **{**RIVALS[name].knobs, **knobs})[1]
        advantages, weight = torch.tensor(own), weight
    torch.testing.assert_close(new.grad, -advantages * weight * mask, rtol=1e-12, atol=1e-14)
    assert metrics["ppo_kl"] == 0 and metrics.get("pg_clipfrac", torch.zeros(())) == 0


@pytest.mark.parametrize("name", RIVALS)
def test_extreme_ratios_and_empty_responses_stay_finite(name):
    case = Case.random(3)
    case.mask[1] = False
    case.old[0, 0], case.new[0, 0] = -200.0, -1e-9
    case.old[2, 0], case.new[2, 0] = -1e-9, -200.0
    for everything_masked in (False, True):
        case.mask &= not everything_masked
        old, new, advantages, mask = tensors(case, torch.float32)
        knobs = REWARDS if name == "bnpo" else {}
        inputs = inputs_of(case, name)
        losses, metrics = RIVALS[name](old, new, advantages, mask, **inputs, **knobs)
        (losses * mask).sum().backward()
        assert losses.isfinite().all() and new.grad.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())
        assert not new.grad[~mask].any()


@pytest.mark.parametrize("name", sorted(set(RIVALS) - set(WHOLE_GROUPS)))
def test_the_training_step_does_not_wait_for_the_device(name):
    """Advantages of whole groups may: they are made in the trainer, on the CPU."""
    case = Case.random(1)
    old, new, advantages, mask = tensors(case, torch.float32)
    inputs = inputs_of(case, name)
    with recorded_syncs() as syncs:
        RIVALS[name](old, new, advantages, mask, **inputs)
    assert syncs == []


@pytest.mark.parametrize(
    "name", ["dcpo", "spo", "pspo", "aspo", "minpro", "advantage_reweighting", "bapo"]
)
def test_twice_the_advantages_are_twice_the_loss(name):
    """So that a soft weight on the advantage is one on the loss."""
    case = Case.random(5)
    old, new, advantages, mask = tensors(case)
    once, _ = RIVALS[name](old, new, advantages, mask)
    twice, _ = RIVALS[name](old, new, 2 * advantages, mask)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)


# ---- single pieces, with numbers ----


def test_dcpo_bounds_are_those_of_the_papers_table():
    from capo_verl.rivals.dcpo import dynamic_bounds

    low, high = dynamic_bounds(
        torch.tensor([0.9, 0.01], dtype=torch.float64).log(), 0.16, 0.2, 10.0
    )
    # q = 0.9: p from 0.69 to 1.06; q = 0.01: p from 0.005 to 0.05.
    assert (low * torch.tensor([0.9, 0.01])).tolist() == pytest.approx([0.6919, 0.005], abs=1e-4)
    assert (high * torch.tensor([0.9, 0.01])).tolist() == pytest.approx([1.0685, 0.05], abs=1e-4)


def test_the_highest_entropies_are_counted_over_the_batch_and_ties_go_by_position():
    entropy = torch.tensor([[0.3, 9.0, 0.3], [0.3, 0.1, 0.2]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    assert highest_entropy(entropy, mask, 0.4).int().tolist() == [[1, 0, 1], [0, 0, 0]]
    assert highest_entropy(entropy, mask, 0.41).int().tolist() == [[1, 0, 1], [1, 0, 0]]
    assert highest_entropy(entropy, mask, 1e-9).sum() == 1  # never none
    fifteen = torch.arange(15.0)[None]
    assert (
        highest_entropy(fifteen, torch.ones(1, 15), 0.2).sum() == 3
    )  # 0.2 * 15 is a little more than 3 in binary


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0.3, 0.6, 1.0, 2.0, 50.0])
def test_bapo_searches_like_the_authors(seed, target):
    case = Case.random(seed, b=8, t=12)
    search = {
        key: value
        for key, value in RIVALS["bapo"].knobs.items()
        if key not in ("dual_clip", "target")
    }
    expected = naive.bapo_bounds(case, target=target, **search)
    _, metrics = RIVALS["bapo"](*tensors(case), target=target)
    assert (float(metrics["bound_low"]), float(metrics["bound_high"])) == pytest.approx(
        expected, abs=1e-12
    )


def test_bapo_without_bad_responses_keeps_its_first_bounds():
    ratio, advantages = torch.full((2, 3), 1.1), torch.ones(2, 3)
    low, high, mass_ratio = balanced_bounds(
        ratio, advantages, torch.ones(2, 3), torch.tensor([0.8, 0.9]), torch.tensor([1.2, 2.0]), 0.5
    )
    assert (float(low), float(high)) == pytest.approx((0.8, 1.2)) and mass_ratio.isinf()


def test_gtpo_protects_what_good_and_bad_responses_share_at_their_ends():
    tokens = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 5, 9, 0], [1, 7, 3, 4, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    advantages = torch.tensor([[1.0], [-1.0], [0.0]]).expand(3, 5)
    weights, conflicts = conflict_weights(
        advantages, mask, tokens, torch.zeros(3, dtype=torch.long), 2.0
    )
    # Shared from the front: 1 2; from the back: 9 (in the second response at another place). The
    # third has no sign.
    assert conflicts.int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert weights.tolist() == [[2, 2, 1, 1, 2], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1]]
    apart, _ = conflict_weights(advantages, mask, tokens, torch.tensor([0, 1, 0]), 2.0)
    assert apart.tolist() == torch.ones(3, 5).tolist()


def test_lopti_alternates_with_the_epoch_and_its_parts_add_up():
    case = Case.random(2)
    arguments = tensors(case)
    low, high, both = (
        RIVALS["lopti"](*arguments, **more)[0]
        for more in ({"epoch": 2}, {"epoch": 3}, {"part": "both"})
    )
    torch.testing.assert_close(low + high, both)
    rare = arguments[0].exp() < 0.5
    assert not low[~rare].any() and not high[rare].any() and low.any() and high.any()


def test_bnpos_weight_is_one_over_the_beta_density():
    """Means 0, 1/2, 1 have the variance 1/4: size 0, and a uniform density."""
    from torch.distributions import Beta

    from capo_verl.rivals.bnpo import beta_parameters

    uniform = beta_parameters(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert [float(x) for x in uniform] == [1, 1]
    # Variance 1/400, mean 1/2: size 99, a = b = 1 + 99 / 6.
    narrow = torch.tensor([0.45, 0.5, 0.55], dtype=torch.float64)
    a, b = beta_parameters(narrow)
    assert (float(a), float(b)) == pytest.approx((17.5, 17.5))
    rewards = torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    new, mask = torch.zeros(4, 1, dtype=torch.float64), torch.ones(4, 1)
    group = torch.tensor([0, 0, 1, 1])
    losses, metrics = RIVALS["bnpo"](new, new, rewards, mask, group=group)
    a, b = metrics["beta_a"], metrics["beta_b"]
    weight = 1 / Beta(a, b).log_prob(torch.tensor(0.5, dtype=torch.float64)).exp()
    assert losses[:, 0].tolist() == pytest.approx([-float(weight) / 2, float(weight) / 2, 0, 0])


def test_pacs_has_the_gradient_of_the_cross_entropy():
    """Against autograd through the sums, the leave-one-out means and torch's own cross-entropy."""
    case = Case.random(3)
    old, new, advantages, mask = tensors(case)
    group = torch.tensor(case.group)
    losses, metrics = RIVALS["pacs"](old, new, advantages, mask, group=group)
    (ours,) = torch.autograd.grad((losses * mask).sum(), new)
    sums = ((new - old) * mask).sum(-1).view(2, 3)
    score = (sums - (sums.sum(-1, keepdim=True) - sums) / 2).flatten()
    good = ((advantages > 0) & mask).any(-1)
    weight = torch.ones(6, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 6)):
        count = int(good[rows].sum())
        if 0 < count < 3:
            weight[rows] = torch.where(good[rows], 3 / (2 * count), 3 / (2 * (3 - count)))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        score, good.double(), weight, reduction="sum"
    )
    torch.testing.assert_close(ours, torch.autograd.grad(loss, new)[0], rtol=1e-12, atol=1e-14)
    assert float(metrics["cross_entropy"]) == pytest.approx(float(loss.detach()) / 6)


def test_empg_sees_the_turns_of_a_response():
    """Two turns with a tool between them; the second is the clear one."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    entropy = torch.tensor([[2.0, 2.0, 99.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    rival = RIVALS["empg"].whole_groups
    advantages, metrics = rival.advantages(
        torch.ones(2, 4), mask, entropy=entropy, k=1.0, k_future=1.0, zeta=0.5
    )
    g = torch.tensor([-1.0, 0.0, -0.5]).exp()
    turn = g / g.mean() + torch.tensor([0.5, 0.0, 0.0])  # the first one's next turn is clear
    turn = turn - turn.mean()
    expected = torch.tensor([[turn[0], turn[0], 0, turn[1]], [turn[2], 0, 0, 0]])
    torch.testing.assert_close(advantages, expected)
    assert float(metrics["turns"]) == 1.5


# ---- knobs and inputs ----


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dcpo", {"eps_lo": 1}, "rival.eps_lo is not a knob of CAPO. Did you mean 'eps_low'"),
        ("dcpo", {"eps_low": 0}, r"rival.eps_low=0: expected a number in \(0, inf\)"),
        ("pspo", {"alpha": 1.5}, r"rival.alpha=1.5: expected a number in \[0, 1\]"),
        ("spo", {"epsilon": "big"}, r"rival.epsilon='big': expected a number in \(0, inf\)"),
        ("spo", {"epsilon": True}, "rival.epsilon=True: expected a number"),
        (
            "lopti",
            {"part": "middle"},
            "rival.part='middle': expected one of alternate, low, high, both",
        ),
        ("bapo", {"low_start": 0.99}, "rival.low_start=0.99: must not exceed rival.low_max=0.95"),
        (
            "gtpo",
            {"entropy_max": -1, "group": 0, "tokens": 0, "entropy": 0},
            r"rival.entropy_max=-1: .*\[0, inf\), or null",
        ),
        (
            "gtpo",
            {"divide_by_conflicts": 1, "group": 0, "tokens": 0, "entropy": 0},
            "expected True or False",
        ),
        ("gtpo", {"tokens": 0, "entropy": 0}, "the loss gtpo needs the argument 'group'"),
        ("entropy_mask", {}, "the loss entropy_mask needs the argument 'entropy'"),
        ("rpg", {"kl": "k3"}, "rival.kl='k3': expected one of fkl, rkl, ufkl, urkl"),
        (
            "bnpo",
            {"reward_max": 0, "group": torch.zeros(6, dtype=torch.long)},
            "rival.reward_min=0.0: must be less than rival.reward_max=0",
        ),
        (
            "bnpo",
            {"group": torch.zeros(6, dtype=torch.long)},
            "rewards from -1.5 to .* are outside; set both to the range of the rewards",
        ),
        ("empg", {"zeta": -1, "entropy": 0}, r"rival.zeta=-1: expected a number in \[0, inf\)"),
        (
            "d3s",
            {"top_share": 2, "entropy": 0},
            r"rival.top_share=2: expected a number in \(0, 1\]",
        ),
        ("pacs", {"beta": 0, "group": 0}, r"rival.beta=0: expected a number in \(0, inf\)"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(name, given, message):
    with pytest.raises(ValueError, match=message):
        RIVALS[name](*tensors(Case.random(0)), **given)


def test_they_need_no_verl():
    code = (
        "import sys; from capo_verl.rivals import RIVALS; "
        "print(len(RIVALS), sorted({'verl', 'ray', 'megatron', 'hydra'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == f"{len(RIVALS)} []\n", result.stderr
