# SPDX-License-Identifier: Apache-2.0
"""The presets: the values of the switch ``+capo=NAME``.

Hydra groups, launchers, studies and the documentation derive from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from capo_verl.config.capo import CapoConfig
from capo_verl.config.kl_budget import KLBudgetConfig


@dataclass(frozen=True)
class Preset:
    """A value of the switch ``+capo=NAME``: CAPO's knobs and the verl settings that belong to
    the variant.
    """

    description: str
    knobs: dict[str, Any] = field(default_factory=dict)
    verl: dict[str, Any] = field(default_factory=dict)
    """Dotted verl config path -> value."""


_PAPER = "arXiv 2510.00819, Qwen2.5-Math-7B on MATH"

PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        f"CAPO ({_PAPER}): group-normalised advantages, each sequence divides by its accepted "
        "tokens",
        {"policy_shift_max": 1e-4, "objective_shift_max": 1e-2},
        {
            "algorithm.adv_estimator": "grpo",
            "algorithm.norm_adv_by_std_in_grpo": True,
            "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
        },
    ),
    "dr_grpo": Preset(
        f"Dr.CAPO ({_PAPER}): advantages r - mean, token sum over the maximum response length",
        {"policy_shift_max": 1e-3, "objective_shift_max": 5e-4},
        {
            "algorithm.adv_estimator": "grpo",
            "algorithm.norm_adv_by_std_in_grpo": False,
            "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-sum-norm",
            "actor_rollout_ref.actor.loss_scale_factor": "${data.max_response_length}",
        },
    ),
    "reinforce": Preset(
        f"ReinCAPO ({_PAPER}): the reward itself as advantage, no baseline",
        {"policy_shift_max": 1e-5, "objective_shift_max": 1e-1},
        {
            "algorithm.adv_estimator": "reinforce",
            "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
        },
    ),
    "soft": Preset(
        "keep every token and weigh it by min(1, sqrt(tau_F / m_F))",
        {"weighting": "soft", "policy_shift_max": 1e-4, "objective_shift_max": None},
    ),
    "kl_budget": Preset(
        "no filter: the learning rate is set so that a step moves the policy by a given KL "
        "divergence",
        {"mode": "off", "kl_budget": asdict(KLBudgetConfig())},
    ),
    "track": Preset(
        "measure m_H and m_F at CAPO's thresholds and change nothing", {"mode": "track"}
    ),
}

FROM_OPTIMIZER = ("betas", "eps")
"""Knobs that inside verl are read from the actor's optimizer at every step, and therefore are no
config keys there.
"""


def verl_knobs(preset: str) -> dict[str, Any]:
    """All knobs of a preset as plain data, in the order of :class:`CapoConfig`, without those of
    the optimizer.
    """
    knobs = {
        f.name: f.default
        for f in fields(CapoConfig)
        if f.name not in FROM_OPTIMIZER and f.default is not MISSING
    }
    return {**knobs, **PRESETS[preset].knobs}


def parse_knobs(knobs: Mapping[str, Any]) -> CapoConfig:
    """The block ``actor_rollout_ref.actor.policy_loss.capo`` as a checked config.

    Raises:
        ValueError: for an unknown key, an invalid value, or a knob which belongs to the optimizer.
    """
    knobs = dict(knobs)
    preset = knobs.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"capo.preset={preset!r}: expected one of {', '.join(PRESETS)}")
    for name in FROM_OPTIMIZER:
        if name in knobs:
            raise ValueError(
                f"capo.{name} is read from the actor's optimizer; set "
                "actor_rollout_ref.actor.optim.* instead"
            )
    return CapoConfig.from_mapping(knobs, exclude=FROM_OPTIMIZER)
