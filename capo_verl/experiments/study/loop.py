# SPDX-License-Identifier: Apache-2.0
"""The tiny tier's training loop: sample, score, filter, step, measure.

The method itself is capo_verl.core's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from capo_verl.experiments.study.config import RunConfig
from capo_verl.experiments.study.objective import group_advantages
from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.stepper import Rollout, Stepper
from capo_verl.experiments.study.warm_start import base_policy, evaluate


@dataclass
class Curve:
    """Rows of a run: one per evaluation, the means of what happened since the one before."""

    rows: list[dict[str, float]] = field(default_factory=list)
    _since: dict[str, list[Tensor | float]] = field(default_factory=dict)

    def add(self, **values: Tensor | float | None) -> None:
        """Values of one optimizer step or rollout; None: not measured."""
        for name, value in values.items():
            if value is not None:
                self._since.setdefault(name, []).append(value)

    def close(self, **row: float) -> None:
        """End a row with the means; of ``kl`` also the largest."""
        for name, values in self._since.items():
            v = torch.tensor([float(x) for x in values], dtype=torch.float64)
            row[name] = float(v.mean())
            if name == "kl":
                row["kl_max"] = float(v.max())
        self.rows.append(row)
        self._since = {}


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """Rollouts after which accuracy is measured.

    They are ``evaluations``, evenly spaced; the last measurement is after the last rollout.
    """
    return sorted({round(steps * (i + 1) / evaluations) for i in range(evaluations)} - {0})


def train(
    config: RunConfig,
    cache: Path | None = None,
    watch: Callable[[int, Stepper], None] | None = None,
) -> tuple[list[dict[str, float]], list[float]]:
    """One run of the tiny tier.

    Args:
        cache: folder of the warm starts; by default in :func:`capo_verl.data.cache.cache_root`.
        watch: called after every rollout with its number, for tests.

    Returns:
        The rows of the curve (first: the base policy, after 0 steps), and the factor of the
        learning rate in every step.

    Raises:
        FloatingPointError: if the parameters are no numbers any more.
    """
    scales = _foreign_scales(config, cache)
    torch.manual_seed(config.seed)  # for verl's clip_cov, which draws from torch's own generator
    model, task = base_policy(config, cache)
    stepper = Stepper(config, model, task, scales)
    prompts, sampling = generator(config.seed, "prompts"), generator(config.seed, "sampling")
    curve, start = Curve(), time.perf_counter()
    curve.close(
        step=0, completions=0, tokens=0, accepted_tokens=0, seconds=0.0,
        accuracy=evaluate(model, task, config.eval_prompts, config.seed),
    )  # fmt: skip
    evaluations = set(evaluation_steps(config.steps, config.evaluations))
    tokens = accepted = 0
    for step in range(config.steps):
        problems = task.problems(config.prompts, prompts).repeat(config.group)
        responses = model.sample(problems.prompts, task.response_length, sampling, task.end)
        rewards = task.reward(problems, responses)
        rollout = Rollout(
            tokens=torch.cat((problems.prompts, responses), 1),
            mask=task.mask(responses),
            advantages=group_advantages(rewards, config.group, config.advantage),
            group=torch.arange(config.prompts).repeat_interleave(config.group),
        )
        curve.add(reward=rewards.mean(), length=rollout.mask.sum(-1).float().mean())
        for measured in stepper.update(rollout):
            tokens += int(measured.pop("tokens"))
            accepted += int(measured.pop("accepted_tokens"))
            curve.add(**measured)
        if watch is not None:
            watch(step, stepper)
        if step + 1 in evaluations:
            if not bool(torch.isfinite(model.flat).all()):
                raise FloatingPointError(f"parameters are not finite after rollout {step + 1}")
            curve.close(
                step=step + 1, completions=(step + 1) * len(responses), tokens=tokens,
                accepted_tokens=accepted, seconds=time.perf_counter() - start,
                accuracy=evaluate(model, task, config.eval_prompts, config.seed),
            )  # fmt: skip
    return curve.rows, stepper.factors


def _foreign_scales(config: RunConfig, cache: Path | None) -> list[float] | None:
    """The sequence of factors which ``lr_scales_of`` asks for; None without it."""
    if config.lr_scales_of is None:
        return None
    source = RunConfig.from_mapping(
        {**replace(config, lr_scales_of=None, lr_scales="mean").to_dict(), **config.lr_scales_of}
    )
    _, factors = train(source, cache)
    if config.lr_scales == "mean":
        return [sum(factors) / len(factors)] * len(factors)
    order = torch.randperm(len(factors), generator=generator(config.seed, "shuffled scales"))
    return [factors[i] for i in order.tolist()]
