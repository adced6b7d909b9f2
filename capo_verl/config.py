# SPDX-License-Identifier: Apache-2.0
"""The knobs of CAPO and the paper's presets: the one place where they are defined and checked.

Everything else (the Hydra group ``capo``, verl's dataclass, the documentation) derives from here. Pure Python: importing
this module pulls in neither torch nor verl, so that Hydra can read the presets cheaply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

OPTIMIZER_MODELS = ("adam", "sgd")
GRANULARITIES = ("token", "sequence", "batch")
MODES = ("filter", "track")
MOMENTS_DTYPES = ("float32", "bfloat16")
ON_NONFINITE = ("error", "skip_batch")


@dataclass(frozen=True)
class CapoConfig:
    """Validated knobs of :class:`capo_verl.CapoFilter`.

    Raises:
        ValueError: naming the knob, the value found and what is allowed.
    """

    optimizer_model: str = "adam"
    """What the optimizer makes of a gradient: ``adam`` (row-wise moments of the LM head) or ``sgd`` (the gradient itself)."""
    top_k: int | None = 50
    """Support size: how many of the largest logits stand for the policy. None = the whole vocabulary."""
    policy_shift_max: float | None = 1e-4
    """tau_F: a token is accepted only if m_F < tau_F (nats). None or 0 switches the test off."""
    objective_shift_max: float | None = 1e-2
    """tau_H: a token is accepted only if m_H < tau_H (units of the advantage). None or 0 switches the test off."""
    objective_shift_min: str | float | None = "symmetric"
    """Lower bound of m_H: ``symmetric`` (m_H > -tau_H), a number (m_H >= number; 0 is the one-sided variant) or None."""
    granularity: str | tuple[str, ...] = "token"
    """What is accepted or rejected as one: ``token``, ``sequence``, ``batch``, or several, applied in turn."""
    mode: str = "filter"
    """``filter`` removes rejected tokens from the loss; ``track`` measures and changes nothing."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates. Inside verl they come from the actor's optimizer instead."""
    eps: float = 1e-8
    """Adam's epsilon. Inside verl it comes from the actor's optimizer instead."""
    moments_dtype: str = "float32"
    """How the moments are stored: ``float32``, or ``bfloat16`` for half the memory (rounded stochastically)."""
    on_nonfinite: str = "error"
    """When hidden states, logits, advantages, the loss or gradients are NaN or infinite: ``error`` stops the run on every
    rank, ``skip_batch`` leaves out the optimizer step and goes on. Used by the engines; ``CapoFilter`` alone always raises."""
    batch_shift_tokens: int | None = 65536
    """How many tokens per rank are kept between optimizer steps for ``batch_shifts()`` (each costs one hidden state of
    memory). 0 switches the batch-level diagnostics off, None keeps all."""
    batch_shift_every: int = 10
    """Batch-level diagnostics in every n-th step (of those measured, with ``track_every``), beginning with the first; in
    between nothing is kept for them. Read by the engines: ``CapoFilter`` alone measures whenever it is asked."""
    track_every: int = 1
    """With ``mode=track`` only: measure every n-th step, beginning with the first. In between nothing is done at all, so the
    moments see the measured steps only. Read by the engines."""

    def __post_init__(self) -> None:
        _one_of("optimizer_model", self.optimizer_model, OPTIMIZER_MODELS)
        _one_of("mode", self.mode, MODES)
        _one_of("moments_dtype", self.moments_dtype, MOMENTS_DTYPES)
        _one_of("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        _integer("top_k", self.top_k, minimum=1, none="the whole vocabulary")
        _integer("batch_shift_tokens", self.batch_shift_tokens, minimum=0, none="all tokens")
        _integer("batch_shift_every", self.batch_shift_every, minimum=1)
        _integer("track_every", self.track_every, minimum=1)
        if self.mode != "track" and self.track_every != 1:
            raise ValueError(
                f"capo.track_every={self.track_every!r} needs capo.mode=track: capo.mode={self.mode} decides in every step"
            )
        _threshold("policy_shift_max", self.policy_shift_max)
        _threshold("objective_shift_max", self.objective_shift_max)
        if isinstance(self.objective_shift_min, str):
            if self.objective_shift_min != "symmetric":
                raise ValueError(
                    f"capo.objective_shift_min={self.objective_shift_min!r}: expected 'symmetric', a number or null"
                )
        elif self.objective_shift_min is not None:
            _number("objective_shift_min", self.objective_shift_min)
        stages = (self.granularity,) if isinstance(self.granularity, str) else self.granularity
        if not isinstance(stages, Sequence) or not stages:
            raise ValueError(f"capo.granularity={self.granularity!r}: expected one or several of {GRANULARITIES}")
        for stage in stages:
            _one_of("granularity", stage, GRANULARITIES)
        if len(set(stages)) != len(stages):
            raise ValueError(f"capo.granularity={self.granularity!r}: name each granularity once")
        object.__setattr__(
            self, "granularity", self.granularity if isinstance(self.granularity, str) else tuple(stages)
        )
        if isinstance(self.betas, str) or not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise ValueError(f"capo.betas={self.betas!r}: expected two numbers in [0, 1)")
        for beta in self.betas:
            _number("betas", beta)
            if not 0 <= beta < 1:
                raise ValueError(f"capo.betas={self.betas!r}: each must be in [0, 1)")
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        _number("eps", self.eps)
        if self.eps < 0:
            raise ValueError(f"capo.eps={self.eps!r}: must be >= 0")

    @property
    def stages(self) -> tuple[str, ...]:
        """The granularities in the order in which they are applied."""
        return (self.granularity,) if isinstance(self.granularity, str) else self.granularity

    def measures(self, step: int) -> bool:
        """Whether anything is looked at in training step ``step``, counted from 0 and from the start of the run."""
        return step % self.track_every == 0

    def takes_batch_shifts(self, step: int) -> bool:
        """Whether training step ``step`` reports the batch-level diagnostics."""
        return (
            self.batch_shift_tokens != 0
            and self.measures(step)
            and step // self.track_every % self.batch_shift_every == 0
        )

    @classmethod
    def from_mapping(cls, knobs: Mapping[str, Any], exclude: Sequence[str] = ()) -> CapoConfig:
        """Build from plain data (YAML, Hydra).

        Args:
            exclude: knobs that are no keys there.

        Raises:
            ValueError: for an unknown key (lists the valid ones) or an invalid value.
        """
        valid = [f.name for f in fields(cls) if f.name not in exclude]
        for key in knobs:
            if key not in valid:
                close = get_close_matches(str(key), valid, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"capo.{key} is not a knob of CAPO.{hint} Valid keys: {', '.join(valid)}")
        return cls(**knobs)


@dataclass(frozen=True)
class Preset:
    """One value of the switch ``+capo=NAME``: CAPO's knobs and the verl settings which belong to the variant."""

    description: str
    knobs: dict[str, Any] = field(default_factory=dict)
    verl: dict[str, Any] = field(default_factory=dict)
    """Dotted verl config path -> value."""


_PAPER = "arXiv 2510.00819, Qwen2.5-Math-7B on MATH"

PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        f"CAPO ({_PAPER}): group-normalised advantages, each sequence divides by its accepted tokens",
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
    "track": Preset("measure m_H and m_F at CAPO's thresholds and change nothing", {"mode": "track"}),
}

FROM_OPTIMIZER = ("betas", "eps")
"""Knobs that inside verl are read from the actor's optimizer at every step, and therefore are no config keys there."""


def verl_knobs(preset: str) -> dict[str, Any]:
    """All knobs of a preset as plain data, in the order of :class:`CapoConfig`, without those of the optimizer."""
    knobs = {f.name: f.default for f in fields(CapoConfig) if f.name not in FROM_OPTIMIZER and f.default is not MISSING}
    return {**knobs, **PRESETS[preset].knobs}


def __getattr__(name: str) -> Any:
    # verl's dataclass lives behind a lazy import: Hydra must be able to read the presets without loading verl.
    if name == "CapoPolicyLossConfig":
        from capo_verl.policy_loss_config import CapoPolicyLossConfig

        return CapoPolicyLossConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _one_of(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"capo.{key}={value!r}: expected one of {', '.join(allowed)}")


def _number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"capo.{key}={value!r}: expected a finite number")


def _integer(key: str, value: Any, minimum: int, none: str | None = None) -> None:
    if value is None and none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        or_null = "" if none is None else f", or null for {none}"
        raise ValueError(f"capo.{key}={value!r}: expected an integer >= {minimum}{or_null}")


def _threshold(key: str, value: Any) -> None:
    if value is None:
        return
    _number(key, value)
    if value < 0:
        raise ValueError(f"capo.{key}={value!r}: a threshold must be >= 0 (0 or null switches the test off)")
