# SPDX-License-Identifier: Apache-2.0
"""Names, papers and knobs of the rival losses: the one place where they are defined and checked.

Pure Python, like :mod:`capo_verl.config`: Hydra reads it in every process. The losses themselves
are in :mod:`capo_verl.rivals`; where each formula and default comes from, in ``docs/rivals.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from capo_verl.config.checks import build

_INF = math.inf


def _number(
    default: float | None,
    low: float,
    high: float = _INF,
    *,
    low_open: bool = False,
    null: bool = False,
) -> Any:
    return field(default=default, metadata={"range": (low, high, low_open), "null": null})


def _choice(default: str, *allowed: str) -> Any:
    return field(default=default, metadata={"choices": allowed})


@dataclass(frozen=True)
class Knobs:
    """Base of the knobs of one rival.

    Raises:
        ValueError: naming the knob, the value found and what is allowed.
    """

    def __post_init__(self) -> None:
        for knob in fields(self):
            _check(knob.name, getattr(self, knob.name), knob.metadata)


def _check(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if "choices" in rule:
        if value not in rule["choices"]:
            raise ValueError(
                f"rival.{name}={value!r}: expected one of {', '.join(rule['choices'])}"
            )
    elif "range" not in rule:
        if not isinstance(value, bool):
            raise ValueError(f"rival.{name}={value!r}: expected True or False")
    elif not (value is None and rule["null"]):
        low, high, low_open = rule["range"]
        good = (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
        if not good or value > high or not (low < value if low_open else low <= value):
            allowed = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high == _INF else ']'}"
            raise ValueError(
                f"rival.{name}={value!r}: expected a number in "
                f"{allowed}{', or null' * rule['null']}"
            )


@dataclass(frozen=True)
class Clip(Knobs):
    """The knobs of PPO's clip, for rivals that change something else about it."""

    clip_low: float = _number(0.2, 0, 1, low_open=True)
    """A ratio below 1 - clip_low has no gradient if the advantage is negative."""
    clip_high: float = _number(0.2, 0, low_open=True)
    """A ratio above 1 + clip_high has no gradient if the advantage is positive."""


@dataclass(frozen=True)
class EntropyMaskKnobs(Clip):
    clip_high: float = _number(0.28, 0, low_open=True)
    top_share: float = _number(0.2, 0, 1, low_open=True)
    """Share of the response tokens, those of the highest entropy, that stay in the loss."""
    normalise_by: str = _choice("selected", "selected", "all")
    """The tokens over which the mean runs: the selected ones (the authors' code) or all response
    tokens.
    """
    dual_clip: float = _number(10.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""


@dataclass(frozen=True)
class LoptiKnobs(Clip):
    clip_high: float = _number(0.24, 0, low_open=True)
    eta: float = _number(0.5, 0, 1, low_open=True)
    """Tokens less probable than this under the old policy are updated apart, and first."""
    alpha: float = _number(0.0, 0, 1)
    """Strength of advantage reweighting, on top; 0 = off."""
    part: str = _choice("alternate", "alternate", "low", "high", "both")
    """Tokens that a step trains on. ``alternate``: low-probability ones in even epochs over the
    batch, the others in odd ones (``+rival=lopti`` sets ``ppo_epochs=2``).
    """
    dual_clip: float = _number(10.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""


@dataclass(frozen=True)
class AdvantageReweightingKnobs(Clip):
    clip_high: float = _number(0.24, 0, low_open=True)
    alpha: float = _number(0.3, 0, 1)
    """The advantage is multiplied by ``alpha * pi_old + 1 - alpha``."""
    dual_clip: float = _number(10.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""


@dataclass(frozen=True)
class DcpoKnobs(Knobs):
    eps_low: float = _number(0.16, 0, low_open=True)
    """Width of the lower bound 1/2 + sqrt(max(0, 1 - 4 eps_low / q)) / 2, q the old probability."""
    eps_high: float = _number(0.2, 0, low_open=True)
    """Width of the upper bound 1/2 + sqrt(1 + 4 eps_high / q) / 2."""
    ratio_max: float = _number(10.0, 1, low_open=True)
    """No ratio counts for more, whatever its bound and the sign of its advantage."""


@dataclass(frozen=True)
class BapoKnobs(Knobs):
    target: float = _number(0.5, 0)
    """The least positive advantage mass, in units of the negative one, for which the bounds are
    widened.
    """
    low_start: float = _number(0.8, 0, 1)
    """The lower bound of the ratio is raised first: from here,"""
    low_max: float = _number(0.95, 0, 1)
    """up to here,"""
    low_step: float = _number(0.05, 1e-3, 1)
    """in steps of this size."""
    high_start: float = _number(1.2, 1)
    """Then the upper bound: from here,"""
    high_max: float = _number(2.0, 1, 100)
    """up to here,"""
    high_step: float = _number(0.1, 1e-2)
    """in steps of this size."""
    dual_clip: float = _number(3.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("low", "high"):
            start, end = getattr(self, f"{side}_start"), getattr(self, f"{side}_max")
            if start > end:
                raise ValueError(
                    f"rival.{side}_start={start!r}: must not exceed rival.{side}_max={end!r}"
                )


@dataclass(frozen=True)
class AspoKnobs(Clip):
    dual_clip: float = _number(3.0, 1, low_open=True)
    """Above it the weight of a token is constant, and keeps its gradient."""


@dataclass(frozen=True)
class CpgdKnobs(Clip):
    drift: float = _number(1e-3, 0)
    """Coefficient of the policy drift, the KL divergence from the old policy."""
    drift_cap: float = _number(2.0, 0)
    """Bound of the drift's weight, ratio - 1."""


@dataclass(frozen=True)
class SpoKnobs(Knobs):
    epsilon: float = _number(0.2, 0, low_open=True)
    """The objective of a token peaks where its ratio has moved by this much."""


@dataclass(frozen=True)
class PspoKnobs(Knobs):
    alpha: float = _number(0.1, 0, 1)
    """Strength of the smoothing of the new probability towards the old one."""


@dataclass(frozen=True)
class MinproKnobs(Knobs):
    weight_max: float = _number(5.0, 0, low_open=True)
    """Bound of a token's weight, ratio times the least ratio before it."""


@dataclass(frozen=True)
class GtpoKnobs(Knobs):
    conflict_weight: float = _number(2.0, 0)
    """Weight of a token in conflict in a response of positive advantage; in one of negative
    advantage its weight is 0.
    """
    entropy_max: float | None = _number(0.7, 0, null=True)
    """A response of higher mean entropy (nats) is left out. null: none is, and no entropies are
    needed.
    """
    entropy_scale: float = _number(0.1, 0)
    """The mean entropy times this is subtracted from the advantage; without effect if
    ``entropy_max`` is null.
    """
    divide_by_conflicts: bool = False
    """Divide the loss of a response by its number of conflicts, as the authors' code does."""


@dataclass(frozen=True)
class RpgKnobs(Clip):
    clip_high: float = _number(0.28, 0, low_open=True)
    kl: str = _choice("ufkl", "fkl", "rkl", "ufkl", "urkl")
    """Divergence from the old policy that regularises: forward or reverse, ``u``: unnormalised."""
    kl_coef: float = _number(1e-4, 0)
    """Its coefficient."""
    dual_clip: float = _number(10.0, 1, low_open=True)
    """A ratio above it has no gradient if the advantage is not positive."""


@dataclass(frozen=True)
class BnpoKnobs(Clip):
    clip_high: float = _number(0.28, 0, low_open=True)
    reward_min: float = _number(0.0, -_INF)
    """The least reward, which counts as 0,"""
    reward_max: float = _number(1.0, -_INF)
    """and the greatest, which counts as 1."""
    weight_max: float = _number(1e6, 0, low_open=True)
    """Bound of a group's weight, one over the Beta density at its mean reward."""
    dual_clip: float = _number(10.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_min >= self.reward_max:
            raise ValueError(
                f"rival.reward_min={self.reward_min!r}: must be less than "
                f"rival.reward_max={self.reward_max!r}"
            )


@dataclass(frozen=True)
class EmpgKnobs(Clip):
    k: float = _number(1.0, 0)
    """Strength with which a step of high entropy is attenuated."""
    k_future: float = _number(1.0, 0)
    """The same of the bonus for a clear next step."""
    zeta: float = _number(0.1, 0)
    """Coefficient of that bonus."""
    dual_clip: float = _number(3.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""


@dataclass(frozen=True)
class D3sKnobs(Clip):
    sample_share: float = _number(0.5, 0, 1, low_open=True)
    """Share of the responses that stay at the start of training: those of the greatest variance
    of the advantage;
    """
    sample_share_end: float = _number(1.0, 0, 1, low_open=True)
    """at its end. Linear in between."""
    top_share: float = _number(0.2, 0, 1, low_open=True)
    """Share of their tokens that stay at the start: the highest entropy times |advantage|;"""
    top_share_end: float = _number(1.0, 0, 1, low_open=True)
    """at its end."""
    dual_clip: float = _number(3.0, 1, low_open=True)
    """With a negative advantage A the loss of a token is at most -dual_clip * A."""


@dataclass(frozen=True)
class PacsKnobs(Knobs):
    beta: float = _number(1.0, 0, low_open=True)
    """Scale of a response's score, the sum of its log-ratios."""
    balance: bool = True
    """Weigh good and bad responses of a group so that both weigh the same in sum."""


@dataclass(frozen=True)
class RivalSpec:
    """A rival without its loss function."""

    paper: str
    """arXiv number."""
    description: str
    knobs: type[Knobs]
    needs: frozenset[str] = frozenset()
    """Keyword inputs of the loss besides verl's four: ``entropy``, ``group``, ``tokens`` or
    ``epoch``.
    """
    optional: frozenset[str] = frozenset()
    """Further ones with a default: ``progress``."""
    whole_groups: bool = False
    """Its advantages look at whole groups or batches: verl's trainer makes them."""
    verl: dict[str, Any] = field(default_factory=dict)
    """Further settings of ``+rival=NAME``. Dotted verl config path -> value."""

    def defaults(self) -> dict[str, Any]:
        return asdict(self.knobs())


_ACTOR = "actor_rollout_ref.actor"
_PER_RESPONSE = {f"{_ACTOR}.loss_agg_mode": "seq-mean-token-mean"}
_SUM_OF_RESPONSE = {f"{_ACTOR}.loss_agg_mode": "seq-mean-token-sum"}

RIVAL_SPECS: dict[str, RivalSpec] = {
    "entropy_mask": RivalSpec(
        "2506.01939", "only the tokens of highest entropy", EntropyMaskKnobs,
        frozenset({"entropy"}), verl={f"{_ACTOR}.calculate_entropy": True},
    ),
    "lopti": RivalSpec(
        "2505.12929", "low-probability tokens in an update of their own", LoptiKnobs,
        frozenset({"epoch"}), verl={f"{_ACTOR}.ppo_epochs": 2},
    ),
    "advantage_reweighting": RivalSpec(
        "2505.12929", "advantages times alpha * pi_old + 1 - alpha", AdvantageReweightingKnobs
    ),
    "dcpo": RivalSpec("2509.02333", "clip bounds that depend on the old probability", DcpoKnobs,
        verl=_PER_RESPONSE),
    "bapo": RivalSpec("2510.18927", "clip bounds that balance positive and negative mass",
        BapoKnobs),
    "aspo": RivalSpec("2510.06062", "inverse ratios for positive advantages", AspoKnobs),
    "cpgd": RivalSpec("2505.12504", "clipped log-ratio and a policy drift", CpgdKnobs),
    "spo": RivalSpec("2401.16025", "a quadratic penalty instead of the clip", SpoKnobs),
    "pspo": RivalSpec("2509.21282", "probabilities smoothed towards the old policy", PspoKnobs),
    "minpro": RivalSpec("2601.22718", "ratios times the least ratio of the prefix", MinproKnobs),
    "gtpo": RivalSpec(
        "2508.03772", "tokens shared by good and bad responses are not punished", GtpoKnobs,
        frozenset({"entropy", "group", "tokens"}), whole_groups=True,
        verl={"algorithm.adv_estimator": "grpo", **_PER_RESPONSE},
    ),
    "rpg": RivalSpec("2505.17508", "a KL term with the weights it needs off-policy", RpgKnobs),
    "bnpo": RivalSpec(
        "2506.02864", "rewards normalised by a Beta density fitted to the batch", BnpoKnobs,
        frozenset({"group"}), whole_groups=True,
        verl={"algorithm.adv_estimator": "reinforce", **_SUM_OF_RESPONSE},
    ),
    "empg": RivalSpec(
        "2509.09265", "advantages of a turn modulated by its entropy and the next one's", EmpgKnobs,
        frozenset({"entropy"}), whole_groups=True, verl={"algorithm.adv_estimator": "grpo"},
    ),
    "d3s": RivalSpec(
        "2509.22115", "responses of high variance, tokens of high |advantage| times entropy",
        D3sKnobs, frozenset({"entropy"}), frozenset({"progress"}), whole_groups=True,
        verl={"algorithm.adv_estimator": "grpo"},
    ),
    "pacs": RivalSpec(
        "2509.02522", "cross-entropy of the reward given the summed log-ratios", PacsKnobs,
        frozenset({"group"}), whole_groups=True,
        verl={
            "algorithm.adv_estimator": "grpo", **_SUM_OF_RESPONSE,
            f"{_ACTOR}.ppo_mini_batch_size": "${data.train_batch_size}",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RivalConfig:
    """The block ``actor_rollout_ref.actor.policy_loss.rival``, checked."""

    name: str
    knobs: Knobs

    @property
    def needs_entropy(self) -> bool:
        """True if the loss looks at entropies, with these knobs."""
        unused = getattr(self.knobs, "entropy_max", 0.0) is None
        return "entropy" in RIVAL_SPECS[self.name].needs and not unused

    @classmethod
    def from_mapping(cls, block: Mapping[str, Any]) -> RivalConfig:
        """Build from plain data (YAML, Hydra): ``name`` and knobs.

        Raises:
            ValueError: for an unknown rival or key (lists the valid ones) or an invalid value.
        """
        block = dict(block)
        name = block.pop("name", None)
        if name not in RIVAL_SPECS:
            raise ValueError(f"rival.name={name!r}: expected one of {', '.join(RIVAL_SPECS)}")
        return cls(name, build(RIVAL_SPECS[name].knobs, block, "rival"))
