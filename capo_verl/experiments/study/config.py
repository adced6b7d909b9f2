# SPDX-License-Identifier: Apache-2.0
"""Everything a run of the loop depends on, and the hash that identifies it. Pure Python.

:class:`LoopConfig` holds what its tiers share, :class:`RunConfig` is the tiny one's;
:mod:`capo_verl.experiments.study.pretrained.config` has the pretrained one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from capo_verl.config import PRESETS

ADVANTAGES = ("grpo", "dr_grpo", "reinforce")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
SCALES = ("mean", "shuffled")
BASES = ("noisy", "early")
SIGNS = ("positive", "negative")
SELECTIONS = ("policy_shift", "entropy", "low_entropy")
VERSION = 2
"""Raised when the meaning of a knob or a measure changes: runs of other versions are other runs."""
BUDGET_VERSION = 3
"""The same for runs under a KL budget, or with several optimizer steps per rollout."""
TARGET_VERSION = 4
"""The same for runs with a ``target_rejection``."""

Config = TypeVar("Config", bound="LoopConfig")


@dataclass(frozen=True)
class LoopConfig:
    """One run: a task, a method and a seed. Every field is a key of the study's YAML.

    Raises:
        ValueError: naming the key, the value found and what is allowed.
    """

    tier: ClassVar[str]
    default_top_k: ClassVar[int | None]
    """``capo.top_k`` of a run that does not set it."""
    keeps_steps: ClassVar[bool] = False
    """True if the measurements of every optimizer step are kept."""

    task: str = ""
    task_knobs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task."""
    seed: int = 1
    lr: float = 5e-4
    steps: int = 200
    """Rollouts; each gives ``mini_batches`` optimizer steps."""
    warmup: int = 10
    """Optimizer steps over which the learning rate rises linearly."""
    lr_final: float = 1.0
    """Share of the squared learning rate left at the end, along half a cosine: what a KL budget
    does to ``delta``."""
    lr_adaptive: float | None = None
    """Control: the KL of a step (nats) above twice which the next rate is divided by 1.5, and below
    half of which it is multiplied by 1.5, within 1e-5..1e-2.

    ``desired_kl`` of rsl_rl, after Schulman; there the KL is that of Gaussian actions.
    """
    prompts: int = 4
    """Prompts per rollout."""
    group: int = 8
    """Completions per prompt."""
    mini_batches: int = 1
    """Optimizer steps per rollout and epoch; must divide ``prompts``."""
    epochs: int = 1
    """Passes over each rollout."""
    reposition: float | None = None
    """SFPO: share of the way of all passes but the last that is kept before the last, in (0, 1]
    (arXiv 2510.04072, its alpha, held constant). None: no such step.
    """
    advantage: str = "grpo"
    """``grpo`` (r - mean) / (std + 1e-4), ``dr_grpo`` r - mean, ``reinforce`` r."""
    aggregation: str = "seq-mean-token-mean"
    """verl's ``loss_agg_mode``; ``seq-mean-token-sum-norm`` divides by the longest response."""
    loss: str = "pg"
    """Policy loss: ``pg``, a rival, or ``verl:NAME``.

    ``pg`` is -A pi/pi_old without clipping; rivals are those of :mod:`capo_verl.rivals`.
    """
    loss_knobs: dict[str, Any] = field(default_factory=dict)
    """Knobs of the loss: a rival's, or fields of verl's actor config.

    ``policy_loss`` of the latter is a mapping.
    """
    capo: dict[str, Any] | None = None
    """Knobs of :class:`capo_verl.CapoConfig`. None: no filter, no control.

    ``preset`` starts from one of its presets. Unless given, ``top_k`` is the whole vocabulary in
    the tiny tier, 50 in the pretrained one.
    """
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = off."""
    betas: tuple[float, float] = (0.9, 0.999)
    entropy_bonus: float = 0.0
    """Subtracts this times the mean token entropy from the loss."""
    reference_penalty: float = 0.0
    """Adds this times the mean k3 estimate of KL(policy || warm start) to the loss."""
    select: dict[str, Any] | None = None
    """Control: drops the response tokens of a mini-batch that rank highest; keys ``by`` (one of
    :data:`SELECTIONS`), ``share`` (of the tokens), ``soft`` (bool, default false): weigh them down
    by the root of what they exceed the share's least by, instead.
    """
    random_drop: float = 0.0
    """Control: drop this share of the response tokens at random."""
    drops_of: dict[str, Any] | None = None
    """Control: settings of a second run; of every optimizer step as many response tokens are
    dropped at random as that run dropped in it."""
    drop_sign: str | None = None
    """Control, ``positive`` or ``negative``: of what the filter rejects, only tokens whose
    advantage has this sign leave the loss. The filter's moments follow what it accepts itself.
    """
    lr_scale: float = 1.0
    """Control: a constant factor of the learning rate."""
    lr_scales_of: dict[str, Any] | None = None
    """Control: settings of a second run, whose learning-rate scales this run uses.

    That run is run first. ``lr_scales`` says how they are used.
    """
    lr_scales: str = "mean"
    """``mean``: constantly the mean of that sequence; ``shuffled``: the sequence in random order.
    """
    evaluations: int = 16
    """Number of evaluations after the start, evenly spaced."""
    eval_prompts: int = 512
    kl_every: int = 4
    """Steps between measurements of the reported KL of a step.

    A budget measures by its own rule.
    """

    def __post_init__(self) -> None:
        _one_of("task", self.task, self.known_tasks())
        _one_of("advantage", self.advantage, ADVANTAGES)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _one_of("lr_scales", self.lr_scales, SCALES)
        for name in (
            "steps",
            "prompts",
            "group",
            "mini_batches",
            "epochs",
            "evaluations",
            "eval_prompts",
            "kl_every",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer >= 1")
        if self.select is not None:
            _one_of("select.by", self.select.get("by"), SELECTIONS)
            if unknown := sorted(set(self.select) - {"by", "share", "soft"}):
                raise ValueError(f"select.{unknown[0]}: expected by, share and soft only")
            if not 0 < _number("select.share", self.select.get("share")) < 1:
                raise ValueError(
                    f"select.share={self.select['share']!r}: expected a share in (0, 1)"
                )
        if self.lr_adaptive is not None:
            object.__setattr__(self, "lr_adaptive", _number("lr_adaptive", self.lr_adaptive))
        for name in ("lr", "lr_scale", "lr_final"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number > 0")
        for name in ("grad_clip", "entropy_bonus", "reference_penalty", "random_drop"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if not 0 <= self.random_drop < 1:
            raise ValueError(f"random_drop={self.random_drop!r}: expected a share in [0, 1)")
        if self.reposition is not None:
            keep = _number("reposition", self.reposition)
            if not 0 < keep <= 1 or self.epochs < 2:
                raise ValueError(
                    f"reposition={self.reposition!r}: expected a share in (0, 1], and epochs >= 2 "
                    f"(it is {self.epochs})"
                )
        if self.prompts % self.mini_batches:
            raise ValueError(
                f"mini_batches={self.mini_batches}: must divide prompts={self.prompts}"
            )
        if (
            self.loss == "lopti"
            and self.loss_knobs.get("part", "alternate") == "alternate"
            and self.epochs % 2
        ):
            raise ValueError(
                f"epochs={self.epochs}: loss=lopti trains on half of the tokens in each; expected "
                "an even number"
            )
        self._check_drops()
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.capo is not None:
            preset = self.capo.get("preset")
            if preset is not None and preset not in PRESETS:
                raise ValueError(f"capo.preset={preset!r}: expected one of {', '.join(PRESETS)}")

    def _check_drops(self) -> None:
        if self.drops_of is not None and self.random_drop:
            raise ValueError(
                f"random_drop={self.random_drop!r}: drops_of says how many; leave one of them out"
            )
        if self.drop_sign is None:
            return
        _one_of("drop_sign", self.drop_sign, SIGNS)
        knobs = self.capo_knobs() or {"mode": "off"}
        if knobs.get("mode", "filter") != "filter" or knobs.get("weighting", "hard") != "hard":
            raise ValueError(
                f"drop_sign={self.drop_sign!r}: needs a filter that drops tokens, capo with "
                "mode=filter and weighting=hard"
            )

    @classmethod
    def known_tasks(cls) -> tuple[str, ...]:
        raise NotImplementedError

    @classmethod
    def from_mapping(cls: type[Config], knobs: Mapping[str, Any]) -> Config:
        """A run from plain data.

        Raises:
            ValueError: for an unknown key (lists the valid ones) or an invalid value.
        """
        valid = [f.name for f in fields(cls)]
        for key in knobs:
            if key not in valid:
                raise ValueError(f"{key} is not a key of a run. Valid keys: {', '.join(valid)}")
        return cls(**knobs)

    def capo_knobs(self) -> dict[str, Any] | None:
        """Arguments of :class:`capo_verl.CapoConfig`, those of the preset filled in."""
        if self.capo is None:
            return None
        knobs = dict(self.capo)
        preset = knobs.pop("preset", None)
        start = PRESETS[preset].knobs if preset else {}
        return {"top_k": self.default_top_k, "betas": self.betas, **start, **knobs}

    def to_dict(self) -> dict[str, Any]:
        """Settings that differ from the defaults, as plain JSON data.

        A later knob with a default does not change old runs' hashes.
        """
        found = {}
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if value != default:
                found[f.name] = value
        return json.loads(json.dumps(found))

    @property
    def run_id(self) -> str:
        """First 16 hex digits of the SHA-256 of version and :meth:`to_dict`."""
        capo = self.capo_knobs() or {}
        version = VERSION
        if "kl_budget" in capo or self.mini_batches * self.epochs > 1:
            version = BUDGET_VERSION
        if isinstance(capo.get("policy_shift_max"), dict):
            version = TARGET_VERSION
        text = json.dumps({"version": version, "tier": self.tier, **self.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def warm_start(self) -> dict[str, Any]:
        """Settings that the warm-started model depends on."""
        raise NotImplementedError


@dataclass(frozen=True)
class RunConfig(LoopConfig):
    """A run of the tiny tier.

    Raises:
        ValueError: as :class:`LoopConfig`.
    """

    tier: ClassVar[str] = "tiny"
    default_top_k: ClassVar[int | None] = None

    task: str = "sort8"
    """A key of :data:`capo_verl.experiments.study.tasks.TASKS`."""
    base: float = 0.4
    """Sampled accuracy of the warm start, in (0, 1)."""
    base_kind: str = "noisy"
    """Kind of the warm start.

    ``noisy``, a competent model that learnt to make mistakes, which is what reinforcement learning
    on verifiable rewards mostly repairs; or ``early``, supervised training stopped early, which has
    more to learn.
    """
    base_seed: int | None = None
    """Seed of the warm start. None: ``seed``."""
    layers: int = 2
    hidden: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("base_kind", self.base_kind, BASES)
        object.__setattr__(self, "base", _number("base", self.base))
        if not 0 < self.base < 1:
            raise ValueError(f"base={self.base!r}: expected an accuracy between 0 and 1")

    @classmethod
    def known_tasks(cls) -> tuple[str, ...]:
        from capo_verl.experiments.study.tasks import TASKS

        return tuple(TASKS)

    @property
    def warm_start(self) -> dict[str, Any]:
        """Settings that the warm-started model depends on."""
        seed = self.seed if self.base_seed is None else self.base_seed
        return {
            "task": self.task, "task_knobs": self.task_knobs, "base": self.base,
            "kind": self.base_kind, "seed": seed, "layers": self.layers, "hidden": self.hidden,
        }  # fmt: skip


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value!r}: expected one of {', '.join(allowed)}")


def _number(key: str, value: Any) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r}: expected a number")
    return float(value)
