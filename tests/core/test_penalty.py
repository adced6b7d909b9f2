# SPDX-License-Identifier: Apache-2.0
"""The penalty's value and gradient, against float64 autograd of the formula with the direction held
fixed, in every layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import ProjectedLogits, curvature_penalty
from capo_verl.core.metrics import StepMetrics
from tests.helpers.batches import Batch
from tests.helpers.layouts import make_groups
from tests.helpers.oracle import Oracle, make_token
from tests.helpers.spawn import run_on_ranks
from tests.helpers.syncs import recorded_syncs

V, H, LR = 21, 6, 0.05
KNOBS: list[dict[str, Any]] = [
    {"top_k": 7, "policy_penalty": 3.0},
    {"top_k": 7, "policy_penalty": 3.0, "policy_shift": "exact"},
    {"top_k": 7, "objective_penalty": 2.0},
    {"top_k": None, "policy_penalty": 3.0, "objective_penalty": 2.0, "policy_shift": "exact"},
    {"top_k": 7, "policy_penalty": 3.0, "objective_penalty": 2.0, "optimizer_model": "sgd"},
]


def config_of(knobs: dict[str, Any]) -> CapoConfig:
    return CapoConfig(policy_shift_max=None, objective_shift_max=None, betas=(0.8, 0.95), **knobs)


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    return [Batch.random(rng, 4, 5, H, V) for _ in range(2)]


def factors(batch: Batch) -> Tensor:
    """Some function of the penalties: what a loss would make of them."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal(batch.mask.shape))


def naive(config: CapoConfig, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Penalties, and the gradients of their weighted sum with respect to hidden states and LM head:
    by autograd, token by token.
    """
    oracle = Oracle(
        V, H, config.optimizer_model, config.top_k, config.betas, config.eps, config.policy_shift
    )
    head = torch.from_numpy(np.random.default_rng(2).standard_normal((V, H)) * 2)
    first, second = batches()
    logits = first.hidden @ head.numpy().T / temperature
    oracle.update(
        [
            make_token(
                first.hidden[i], logits[i], first.actions[i], first.advantages[i], config.top_k
            )
            for i in zip(*np.nonzero(first.mask), strict=True)
        ]
    )
    hidden = torch.from_numpy(second.hidden).requires_grad_()
    head.requires_grad_()
    z = hidden @ head.T / temperature
    penalties = torch.zeros(second.mask.shape, dtype=torch.float64)
    for i in zip(*np.nonzero(second.mask), strict=True):
        token = make_token(
            second.hidden[i],
            z[i].detach().numpy(),
            second.actions[i],
            second.advantages[i],
            config.top_k,
        )
        u = torch.from_numpy(oracle.precondition(token.rows, token.g) @ token.h)
        pi = z[i][torch.from_numpy(token.rows)].softmax(-1)
        e = torch.from_numpy((token.rows == second.actions[i]).astype(float))
        d = (e - pi) @ u
        fisher = pi @ u**2 - (pi @ u) ** 2
        m_f = 0.5 * LR**2 * (fisher if config.policy_shift == "exact" else d**2)
        m_h = LR * token.advantage * d + 0.5 * LR**2 * token.advantage * (d**2 - fisher)
        penalties[i] = config.policy_penalty * m_f - config.objective_penalty * m_h
    (penalties * factors(second)).sum().backward()
    return penalties.detach(), hidden.grad, head.grad


def ours(
    config: CapoConfig,
    tp: int = 1,
    dp: int = 1,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
    skip_masked: bool = False,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """The same of this rank's share: its sequences, its rows of the LM head."""
    at, groups = make_groups(tp, dp, 1)
    capo = CapoFilter(config, V, H, **groups)
    head = torch.from_numpy(np.random.default_rng(2).standard_normal((V, H)) * 2)
    rows, start = capo.shard.rows, capo.shard.start
    head = (
        torch.nn.functional.pad(head, (0, 0, 0, rows * tp - V))[start : start + rows]
        .to(dtype)
        .requires_grad_()
    )
    mine = slice(at.dp * 4 // dp, (at.dp + 1) * 4 // dp)
    for batch in batches():
        hidden, _, actions, advantages, mask, _ = batch.arguments(LR, dtype)
        hidden = hidden[mine].clone().requires_grad_()
        logits = hidden @ head.T
        out = capo.evaluate(
            hidden, logits, actions[mine], advantages[mine], mask[mine], LR,
            temperature=torch.full_like(mask[mine], temperature, dtype=dtype),
            skip_masked=skip_masked, max_tokens=max_tokens,
        )  # fmt: skip
        last, penalty_of = batch, curvature_penalty(logits, out.penalty_terms)
        logits.div_(temperature)  # as trainers do
        capo.step()
    (penalty_of * factors(last)[mine].to(penalty_of.dtype)).sum().backward()
    gradient = (
        hidden.grad if tp == 1 else all_reduced(hidden.grad, groups["tp_group"])
    )  # as Megatron's output layer does
    head_gradient = head.grad if dp == 1 else all_reduced(head.grad, groups["dp_group"])
    return {
        "at": at,
        "penalty": penalty_of.detach(),
        "hidden": gradient,
        "head": head_gradient,
        "terms": out.penalty_terms,
    }


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_equals_autograd_of_the_formula(knobs, temperature):
    config = config_of(knobs)
    penalties, hidden, head = naive(config, temperature)
    assert penalties.abs().max() > 1e-4 and hidden.abs().max() > 1e-4
    for layout in ({}, {"skip_masked": True}, {"skip_masked": True, "max_tokens": 19}):
        found = ours(config, temperature=temperature, **layout)
        torch.testing.assert_close(found["penalty"], penalties, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(found["hidden"], hidden, rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(found["head"], head, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_every_layout_has_the_gradient_of_one_process(layout):
    tp, dp = layout
    ranks = run_on_ranks(on_ranks, tp * dp, tp, dp)
    for case, knobs in enumerate(KNOBS):
        penalties, hidden, head = naive(config_of(knobs), 0.7)
        rows = -(-V // tp)
        padded = torch.nn.functional.pad(head, (0, 0, 0, rows * tp - V))
        for found in (rank[case] for rank in ranks):
            at = found["at"]
            torch.testing.assert_close(
                found["penalty"], penalties.chunk(dp)[at.dp], rtol=1e-9, atol=1e-15
            )
            torch.testing.assert_close(
                found["hidden"], hidden.chunk(dp)[at.dp], rtol=1e-8, atol=1e-13
            )
            torch.testing.assert_close(
                found["head"], padded[at.tp * rows : (at.tp + 1) * rows], rtol=1e-8, atol=1e-13
            )


def on_ranks(tp: int, dp: int) -> list[dict[str, Any]]:
    return [ours(config_of(knobs), tp, dp, 0.7) for knobs in KNOBS]


def test_blocks_of_tokens_change_nothing(monkeypatch):
    monkeypatch.setattr("capo_verl.core.filter.block_tokens", lambda device: 3)
    monkeypatch.setattr("capo_verl.core.support.scratch_elements", lambda device: 50)
    monkeypatch.setattr("capo_verl.core.kernels.plain.BLOCK_ENTRIES", 9)
    for knobs in KNOBS:
        cut = ours(config_of(knobs))
        expected = naive(config_of(knobs))
        torch.testing.assert_close(cut["head"], expected[2], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, tolerance):
    """The gradient arrives in the logits' dtype."""
    config = config_of({**KNOBS[3]})
    penalties, hidden, _ = naive(config)
    found = ours(config, dtype=dtype)
    assert found["hidden"].dtype == dtype and found["penalty"].dtype == torch.float32
    for mine, expected in ((found["penalty"], penalties), (found["hidden"], hidden)):
        assert float((mine.double() - expected).abs().max() / expected.abs().max()) < tolerance


def test_decisions_and_shifts_are_those_without_a_penalty():
    knobs = {"top_k": 7, "policy_shift_max": 2e-4, "objective_shift_max": None}
    with_penalty, without = (
        CapoFilter(CapoConfig(**knobs, policy_penalty=1.0), V, H),
        CapoFilter(CapoConfig(**knobs), V, H),
    )
    for batch in batches():
        a, b = with_penalty.evaluate(*batch.arguments(LR)), without.evaluate(*batch.arguments(LR))
        torch.testing.assert_close(a.policy_shift, b.policy_shift, rtol=1e-12, atol=0)
        assert torch.equal(a.accepted, b.accepted) and 0 < int(a.accepted.sum()) < batch.mask.sum()
        assert b.penalty_terms is None
        with_penalty.step(), without.step()
    tracking = CapoFilter(CapoConfig(**knobs, policy_penalty=1.0, mode="track"), V, H)
    assert tracking.evaluate(*batch.arguments(LR)).penalty_terms is None


def test_outside_the_mask_anything_goes_and_has_no_gradient():
    hidden, logits, actions, advantages, mask, lr = batches()[0].arguments(LR)
    mask[1, 2] = False
    logits[1, 2], advantages[1, 2] = float("nan"), float("inf")
    logits.requires_grad_()
    for skip in (False, True):
        capo = CapoFilter(config_of(KNOBS[3]), V, H)
        out = capo.evaluate(hidden, logits, actions, advantages, mask, lr, skip_masked=skip)
        penalty = curvature_penalty(logits, out.penalty_terms)
        assert not penalty[~mask].any()
        (gradient,) = torch.autograd.grad(penalty.sum(), logits)
        assert (
            not gradient[~mask].any() and gradient[mask].isfinite().all() and gradient[mask].any()
        )


def test_nothing_waits_for_the_device_and_nothing_wide_is_kept():
    *tensors, lr = batches()[0].arguments(LR)
    config = config_of(KNOBS[0])
    out = CapoFilter(config, V, H).evaluate(*tensors, lr)
    logits = tensors[1].requires_grad_()
    with recorded_syncs() as syncs:
        curvature_penalty(logits, out.penalty_terms).sum().backward()
    assert syncs == []
    assert out.penalty_terms.gradient.shape == out.penalty_terms.places.shape == (20, 7)


def test_metrics_report_the_mean():
    batch, metrics = batches()[0], StepMetrics()
    out = CapoFilter(config_of(KNOBS[0]), V, H).evaluate(*batch.arguments(LR))
    mask = torch.from_numpy(batch.mask)
    metrics.add(
        out, torch.from_numpy(batch.advantages), mask, torch.arange(4).repeat_interleave(5), 4
    )
    expected = 3.0 * float(out.policy_shift[mask].mean())
    assert expected > 0 and metrics.compute()["capo/penalty_mean"] == pytest.approx(expected)


def test_what_cannot_work_is_refused():
    hidden, logits, *rest = batches()[0].arguments(LR)
    capo = CapoFilter(config_of(KNOBS[0]), V, H)
    with pytest.raises(
        ValueError,
        match="capo.policy_penalty and capo.objective_penalty are functions of the logits",
    ):
        capo.evaluate(hidden, ProjectedLogits(torch.zeros(V, H, dtype=torch.float64)), *rest)
    terms = capo.evaluate(hidden, logits, *rest).penalty_terms
    with pytest.raises(
        ValueError,
        match=r"logits: expected \[4, 5\] and the vocabulary rows, as evaluated, got \[20, 21\]",
    ):
        curvature_penalty(logits.flatten(0, 1), terms)
    assert "context parallelism of size 2" in run_on_ranks(over_context_parallel, 2)[0]


def over_context_parallel() -> str:
    with pytest.raises(ValueError) as error:
        CapoFilter(config_of(KNOBS[0]), V, H, cp_group=dist.group.WORLD)
    return str(error.value)
