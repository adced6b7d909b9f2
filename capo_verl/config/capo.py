# SPDX-License-Identifier: Apache-2.0
"""The knobs of the filter, ``policy_loss.capo``: defined and checked here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capo_verl.config.checks import between, build, integer, number, one_of, threshold
from capo_verl.config.kl_budget import KLBudgetConfig

OPTIMIZER_MODELS = ("adam", "sgd")
GRANULARITIES = ("token", "sequence", "batch")
MODES = ("filter", "track", "off")
POLICY_SHIFTS = ("sampled", "exact")
WEIGHTINGS = ("hard", "soft")
MOMENTS_DTYPES = ("float32", "bfloat16")
ON_NONFINITE = ("error", "skip_batch")


@dataclass(frozen=True)
class TargetRejection:
    """A threshold that sets itself, so that ``target_rejection`` of the tokens lie above it.

    It follows the quantile of m_F per squared learning rate, and what was rejected.

    Raises:
        ValueError: naming the knob, the value found and what is allowed.
    """

    target_rejection: float
    """Share of the response tokens to reject, in (0, 1)."""
    memory: float = 0.9
    """Share of the old quantile's logarithm that a step keeps, in [0, 1); the first steps keep
    less.
    """

    def __post_init__(self) -> None:
        for name in ("target_rejection", "memory"):
            between(
                f"policy_shift_max.{name}",
                getattr(self, name),
                0,
                0.999,
                low_open=name == "target_rejection",
            )


@dataclass(frozen=True)
class CapoConfig:
    """Validated knobs of :class:`capo_verl.CapoFilter`.

    Raises:
        ValueError: naming the knob, the value found and what is allowed.
    """

    optimizer_model: str = "adam"
    """The optimizer's step for a gradient: ``adam`` (row-wise moments of the LM head) or ``sgd``
    (the gradient itself).
    """
    top_k: int | None = 50
    """Support size: how many of the largest logits stand for the policy.

    None = the whole vocabulary.
    """
    policy_shift_max: float | TargetRejection | None = 1e-4
    """tau_F: a token is accepted only if m_F < tau_F (nats). None or 0 switches the test off.
    ``{target_rejection: 0.02}`` sets it so that this share is rejected, whatever the learning rate
    does. Nothing is rejected by this test before the first quantile of m_F, which is that of the
    first step (with ``adam`` of the second: before it has moments its m_F is on another scale).
    """
    policy_shift: str = "sampled"
    """Form of m_F: ``sampled``, lr^2/2 d^2 of the taken token (the paper's), or ``exact``, its
    expectation over the policy.
    """
    weighting: str = "hard"
    """``hard`` drops what leaves the trust region. ``soft`` keeps every token, with weight min(1,
    sqrt(tau_F / m_F)).
    """
    max_rejection: float | None = None
    """Guard: if more than this share of the tokens is rejected in ``max_rejection_steps`` optimizer
    steps in a row, filtering stops for the rest of the run, with a warning. None switches the guard
    off.
    """
    max_rejection_steps: int = 5
    """Steps in a row of ``max_rejection``."""
    objective_shift_max: float | None = 1e-2
    """tau_H: a token is accepted only if m_H < tau_H (units of the advantage).

    None or 0 switches the test off.
    """
    objective_shift_min: str | float | None = "symmetric"
    """Lower bound of m_H: ``symmetric`` (m_H > -tau_H), a number (m_H >= number; 0 is the one-sided
    variant) or None.
    """
    reference_lr: float | None = None
    """Learning rate for which tau_F and tau_H are given: at the rate lr of a step they are
    tau_F (lr/reference_lr)^2 and tau_H lr/reference_lr, as m_F and the first term of m_H are, so
    that schedules and a ``kl_budget`` do not change what is rejected. None = the same thresholds at
    every rate, as in the paper.
    """
    granularity: str | tuple[str, ...] = "token"
    """Units that are accepted or rejected as one: ``token``, ``sequence``, ``batch``, or several,
    applied in turn.
    """
    mode: str = "filter"
    """``filter`` removes rejected tokens from the loss; ``track`` measures and changes nothing;
    ``off`` does not even measure, for runs that want the ``kl_budget`` alone; NaN is then found by
    the KL probe only, after the step.
    """
    policy_penalty: float = 0.0
    """lambda_F: adds lambda_F * m_F, as a function of the logits along a fixed direction, to the
    loss of every token that is kept. Needs ``granularity=token``; ignored with ``mode=track``.
    """
    objective_penalty: float = 0.0
    """lambda_H: adds -lambda_H * m_H to the loss of every token that is kept."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates. Inside verl they come from the actor's optimizer instead."""
    eps: float = 1e-8
    """Adam's epsilon. Inside verl it comes from the actor's optimizer instead."""
    moments_dtype: str = "float32"
    """Storage of the moments: ``float32``, or ``bfloat16`` for half the memory (rounded
    stochastically).
    """
    on_nonfinite: str = "error"
    """When hidden states, logits, advantages, the loss or gradients are NaN or infinite: ``error``
    stops the run on every rank, ``skip_batch`` leaves out the optimizer step and goes on. Used by
    the engines; ``CapoFilter`` alone always raises.
    """
    batch_shift_tokens: int | None = 65536
    """Number of tokens per rank that are kept between optimizer steps for ``batch_shifts()`` (each
    costs one hidden state of memory). 0 switches the batch-level diagnostics off, None keeps all.
    """
    batch_shift_every: int = 10
    """Batch-level diagnostics in every n-th step (of those measured, with ``track_every``),
    beginning with the first; in between nothing is kept for them. Read by the engines:
    ``CapoFilter`` alone measures whenever it is asked.
    """
    track_every: int = 1
    """With ``mode=track`` only: measure every n-th step, beginning with the first. In between
    nothing is done at all, so the moments see the measured steps only. Read by the engines.
    """
    sample_tokens_every: int | None = None
    """Write some sequences with what the filter saw of each token, for ``capo-verl report``, in
    every n-th training step, beginning with the first. None = never. Read by the engines.
    """
    sample_tokens: int = 4
    """Number of sequences; half of them are those with most rejected tokens."""
    sample_tokens_dir: str | None = None
    """Folder of the file ``capo_tokens.jsonl``.

    Inside verl ``trainer.default_local_dir``, where the checkpoints are.
    """
    kl_budget: KLBudgetConfig | None = None
    """Controls the learning rate by the KL divergence measured after each step; a number is its
    ``delta``. None = off.
    """

    def __post_init__(self) -> None:
        # Each knob by itself,
        self._check_choices()
        self._check_counts()
        self._check_thresholds()
        self._check_granularity()
        self._check_optimizer()
        self._check_kl_budget()
        # and what it asks of others.
        self._check_weighting()
        self._check_reference_lr()
        self._check_mode()

    def _check_choices(self) -> None:
        one_of("optimizer_model", self.optimizer_model, OPTIMIZER_MODELS)
        one_of("mode", self.mode, MODES)
        one_of("moments_dtype", self.moments_dtype, MOMENTS_DTYPES)
        one_of("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        one_of("policy_shift", self.policy_shift, POLICY_SHIFTS)
        one_of("weighting", self.weighting, WEIGHTINGS)
        if self.sample_tokens_dir is not None and not isinstance(self.sample_tokens_dir, str):
            raise ValueError(
                f"capo.sample_tokens_dir={self.sample_tokens_dir!r}: expected a path, or null"
            )

    def _check_counts(self) -> None:
        integer("top_k", self.top_k, minimum=1, none="the whole vocabulary")
        integer("batch_shift_tokens", self.batch_shift_tokens, minimum=0, none="all tokens")
        integer("sample_tokens_every", self.sample_tokens_every, minimum=1, none="no samples")
        for name in ("batch_shift_every", "track_every", "sample_tokens", "max_rejection_steps"):
            integer(name, getattr(self, name), minimum=1)

    def _check_thresholds(self) -> None:
        if isinstance(self.policy_shift_max, Mapping):
            found = build(TargetRejection, self.policy_shift_max, "capo.policy_shift_max")
            object.__setattr__(self, "policy_shift_max", found)
        if not isinstance(self.policy_shift_max, TargetRejection):
            threshold("policy_shift_max", self.policy_shift_max)
        threshold("objective_shift_max", self.objective_shift_max)
        if isinstance(self.objective_shift_min, str):
            if self.objective_shift_min != "symmetric":
                raise ValueError(
                    f"capo.objective_shift_min={self.objective_shift_min!r}: expected 'symmetric', "
                    "a number or null"
                )
        elif self.objective_shift_min is not None:
            number("objective_shift_min", self.objective_shift_min)
        if self.reference_lr is not None:
            between("reference_lr", self.reference_lr, 0, 1e18, low_open=True)
        if self.max_rejection is not None:
            between("max_rejection", self.max_rejection, 0, 1, low_open=True)
        for name in ("policy_penalty", "objective_penalty"):
            number(name, getattr(self, name))
            threshold(name, getattr(self, name))

    def _check_granularity(self) -> None:
        given = self.granularity
        stages = (given,) if isinstance(given, str) else given
        if not isinstance(stages, Sequence) or not stages:
            raise ValueError(
                f"capo.granularity={given!r}: expected one or several of {GRANULARITIES}"
            )
        for stage in stages:
            one_of("granularity", stage, GRANULARITIES)
        if len(set(stages)) != len(stages):
            raise ValueError(f"capo.granularity={given!r}: name each granularity once")
        object.__setattr__(self, "granularity", given if isinstance(given, str) else tuple(stages))

    def _check_optimizer(self) -> None:
        if (
            isinstance(self.betas, str)
            or not isinstance(self.betas, Sequence)
            or len(self.betas) != 2
        ):
            raise ValueError(f"capo.betas={self.betas!r}: expected two numbers in [0, 1)")
        for beta in self.betas:
            number("betas", beta)
            if not 0 <= beta < 1:
                raise ValueError(f"capo.betas={self.betas!r}: each must be in [0, 1)")
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        number("eps", self.eps)
        if self.eps < 0:
            raise ValueError(f"capo.eps={self.eps!r}: must be >= 0")

    def _check_weighting(self) -> None:
        tau, tokens_only = self.policy_shift_max, self.stages == ("token",)
        if self.weighting != "hard":
            key = f"capo.weighting={self.weighting}"
            if not tokens_only:
                raise ValueError(
                    f"{key} weighs single tokens: set capo.granularity=token, not "
                    f"{self.granularity!r}"
                )
            if not tau:
                raise ValueError(
                    f"{key} needs capo.policy_shift_max > 0 (or a target_rejection), got {tau!r}"
                )
            if self.objective_shift_max or isinstance(self.objective_shift_min, int | float):
                raise ValueError(
                    f"{key} has no m_H test, but "
                    f"capo.objective_shift_max={self.objective_shift_max!r} and "
                    f"objective_shift_min={self.objective_shift_min!r}; set "
                    "capo.objective_shift_max=null and objective_shift_min=null"
                )
        if isinstance(tau, TargetRejection) and len(self.stages) > 1:
            raise ValueError(
                "capo.policy_shift_max.target_rejection follows one granularity, but "
                f"capo.granularity={self.granularity!r}; set "
                "it to one of them, or policy_shift_max to a number"
            )
        if isinstance(tau, TargetRejection) and self.stages == ("batch",):
            raise ValueError(
                "capo.policy_shift_max.target_rejection is a share of the tokens, but with "
                "capo.granularity=batch all of them have "
                "one m_F; set granularity=token or sequence, or policy_shift_max to a number"
            )
        for name in ("policy_penalty", "objective_penalty"):
            if getattr(self, name) and not tokens_only:
                raise ValueError(
                    f"capo.{name}={getattr(self, name)!r} is of single tokens: set "
                    f"capo.granularity=token, not {self.granularity!r}"
                )

    def _check_reference_lr(self) -> None:
        tau, low = self.policy_shift_max, self.objective_shift_min
        fixed = not isinstance(tau, TargetRejection) and bool(tau)
        objective = self.objective_shift_max or (isinstance(low, int | float) and low)
        if self.reference_lr is not None and not (fixed or objective):
            raise ValueError(
                f"capo.reference_lr={self.reference_lr!r} has no effect: there is no fixed "
                f"threshold, but capo.policy_shift_max={tau!r} and "
                f"objective_shift_max={self.objective_shift_max!r}; leave it out"
            )

    def _check_mode(self) -> None:
        """Refuse knobs that have no effect: ``mode=off`` leaves out everything but the KL
        budget.
        """
        if self.mode != "track" and self.track_every != 1:
            raise ValueError(
                f"capo.track_every={self.track_every!r} needs capo.mode=track: "
                f"capo.mode={self.mode} decides in every step"
            )
        if self.mode != "off":
            return
        if self.sample_tokens_every is not None:
            raise ValueError(
                f"capo.sample_tokens_every={self.sample_tokens_every!r} needs the shifts of the "
                "tokens, which capo.mode=off does not measure; set capo.mode=track"
            )
        for name in (
            "weighting",
            "max_rejection",
            "reference_lr",
            "policy_penalty",
            "objective_penalty",
            "on_nonfinite",
        ):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"capo.{name}={value!r} has no effect with capo.mode=off; set capo.mode=filter "
                    "(or track), or leave it out"
                )

    def _check_kl_budget(self) -> None:
        budget = self.kl_budget
        if isinstance(budget, int | float) and not isinstance(budget, bool):
            budget = KLBudgetConfig(delta=budget)
        elif isinstance(budget, Mapping):
            budget = build(KLBudgetConfig, budget, "capo.kl_budget")
        elif budget is not None and not isinstance(budget, KLBudgetConfig):
            raise ValueError(
                f"capo.kl_budget={budget!r}: expected delta, a mapping of its knobs, or null"
            )
        object.__setattr__(self, "kl_budget", budget)

    @property
    def stages(self) -> tuple[str, ...]:
        """The granularities in the order in which they are applied."""
        return (self.granularity,) if isinstance(self.granularity, str) else self.granularity

    def measures(self, step: int) -> bool:
        """True if training step ``step``, counted from 0 over the whole run, is looked at."""
        return step % self.track_every == 0

    def takes_batch_shifts(self, step: int) -> bool:
        """True if training step ``step`` reports the batch-level diagnostics."""
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
        return build(cls, knobs, "capo", exclude)
