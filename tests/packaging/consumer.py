# SPDX-License-Identifier: Apache-2.0
"""A trainer's use of the public API, for ``mypy --strict``: ``assert_type`` fails where a type is
lost to Any. Never run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from capo_verl import CapoConfig, CapoFilter, __version__
from capo_verl.config import PRESETS, KLBudgetConfig, TargetRejection
from capo_verl.core import CapoOutput, ProjectedLogits, curvature_penalty
from capo_verl.core.kl_budget import KLBudget
from capo_verl.rivals import RIVALS


def make() -> tuple[CapoFilter, KLBudget]:
    knobs = CapoConfig(policy_shift_max=TargetRejection(0.02), kl_budget=KLBudgetConfig(delta=1e-3))
    assert_type(CapoConfig.from_mapping(PRESETS["grpo"].knobs), CapoConfig)
    assert_type(knobs.kl_budget, KLBudgetConfig | None)
    assert_type(__version__, str)
    assert knobs.kl_budget is not None
    capo = CapoFilter(knobs, vocab_size=8, hidden_size=4, device=torch.device("cpu"))
    assert_type(capo, CapoFilter)
    return capo, KLBudget(knobs.kl_budget)


def step(
    capo: CapoFilter,
    budget: KLBudget,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
) -> None:
    rate = assert_type(budget.begin_step(1e-3, 1e-3, progress=0.5), float)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    out = capo.evaluate(hidden, ProjectedLogits(weight), tokens, advantages, mask, rate)
    assert_type(out, CapoOutput)
    assert_type(
        (out.accepted, out.weights, out.policy_shift, out.objective_shift),
        tuple[Tensor, Tensor, Tensor, Tensor],
    )
    assert_type(capo.batch_shifts().before.policy, Tensor)
    assert_type(
        RIVALS["spo"](advantages, advantages, advantages, mask, epsilon=0.2),
        tuple[Tensor, dict[str, Tensor]],
    )
    if out.penalty_terms is not None:
        assert_type(curvature_penalty(hidden @ weight.T, out.penalty_terms), Tensor)
    capo.step()
    budget.end_step(3e-4)
    budget.load_state_dict(assert_type(budget.state_dict(), dict[str, float | None]))


def mistakes(capo: CapoFilter, budget: KLBudget) -> None:
    """Each must be an error: an ignore that is not needed is one too (``warn_unused_ignores``)."""
    CapoConfig(policy_shift_max="1e-4")  # type: ignore[arg-type]
    CapoConfig(policy_shift_min=1e-4)  # type: ignore[call-arg]
    CapoFilter(CapoConfig(), 8)  # type: ignore[call-arg]
    capo.evaluate(torch.ones(1))  # type: ignore[call-arg]
    budget.end_step("3")  # type: ignore[arg-type]
    _: str = budget.begin_step(1e-3, 1e-3)  # type: ignore[assignment]
    capo.no_such_method()  # type: ignore[attr-defined]
