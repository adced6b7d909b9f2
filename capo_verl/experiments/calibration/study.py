# SPDX-License-Identifier: Apache-2.0
"""The calibration study on the tiny tier.

Runs of plain GRPO are measured at intervals, from early to late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd
import torch

from capo_verl.commands.calibrate import tables
from capo_verl.commands.calibrate.policy import DEPTHS, Policy
from capo_verl.commands.calibrate.predicted import Predictions
from capo_verl.commands.calibrate.rollouts import Rollouts, group_advantages
from capo_verl.commands.calibrate.step import measure_step, train_step
from capo_verl.config import CapoConfig

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
PHASES = ("early", "late")
"""First and second half of a run."""


@dataclass(frozen=True)
class TinyStudy:
    """Key ``tiny`` of the study's YAML.

    Raises:
        ValueError: naming the key, the value found and what is allowed.
    """

    tasks: tuple[str, ...] = ("sort8", "sums")
    base: float = 0.4
    layers: int = 4
    seeds: tuple[int, ...] = (1, 2, 3)
    lrs: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"adam": (1e-4, 5e-4), "sgd": (0.1,)}
    )
    """Optimizer -> learning rates. The filter's optimizer model is that of the optimizer."""
    steps: int = 100
    every: int = 5
    """Every n-th step is measured; the first ``warmup`` are not."""
    warmup: int = 10
    prompts: int = 4
    group: int = 8
    tokens_kept: int = 48
    """Tokens of each measured step that are kept for pictures."""

    def __post_init__(self) -> None:
        for name in ("layers", "steps", "every", "prompts", "group"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or value < (2 if name == "group" else 1)
            ):
                raise ValueError(
                    f"tiny.{name}={value!r}: expected a whole number, at least "
                    f"{2 if name == 'group' else 1}"
                )
        if self.steps <= self.warmup:
            raise ValueError(
                f"tiny.steps={self.steps}: nothing is measured in the first {self.warmup} steps"
            )
        unknown = sorted(set(self.lrs) - set(OPTIMIZERS))
        if unknown:
            raise ValueError(f"tiny.lrs.{unknown[0]}: expected {' or '.join(OPTIMIZERS)}")
        rates = {name: tuple(float(lr) for lr in values) for name, values in self.lrs.items()}
        object.__setattr__(self, "lrs", rates)
        for name in ("tasks", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def runs(self) -> list[tuple[str, str, float, int]]:
        """Task, optimizer, learning rate and seed of each run."""
        return [
            (t, o, lr, s)
            for t in self.tasks
            for o, lrs in self.lrs.items()
            for lr in lrs
            for s in self.seeds
        ]


@dataclass
class Results:
    """Measurements of the runs, as tables."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[pd.DataFrame] = field(default_factory=list)

    def frames(self) -> dict[str, pd.DataFrame]:
        """Tables by name.

        ``calibration`` (per step, depth and predictor), ``calibration_batches``,
        ``calibration_tokens``.
        """
        frames = {
            "calibration": pd.DataFrame(self.steps),
            "calibration_batches": pd.DataFrame(self.batches),
            "calibration_tokens": pd.concat(self.tokens, ignore_index=True)
            if self.tokens
            else pd.DataFrame(),
        }
        for frame in frames.values():  # half the size; more digits mean nothing here
            for column in frame.select_dtypes("float64"):
                if column != "lr":
                    frame[column] = frame[column].astype("float32")
        return frames


def build(cls: type[Any], knobs: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain data.

    Raises:
        ValueError: for an unknown key (lists the valid ones) or an invalid value.
    """
    valid = [f.name for f in fields(cls)]
    for key in knobs:
        if key not in valid:
            raise ValueError(f"{where}.{key}: unknown key; valid: {', '.join(valid)}")
    return cls(**knobs)


def run_tiny(study: TinyStudy, advance: Callable[[str], None] = lambda what: None) -> Results:
    """All runs of the study.

    Args:
        advance: called after each run with its name.
    """
    results = Results()
    for task, optimizer, lr, seed in study.runs():
        _trajectory(study, task, optimizer, lr, seed, results)
        advance(f"{task} {optimizer} {lr:g} seed {seed}")
    return results


def _trajectory(
    study: TinyStudy, task_name: str, optimizer_name: str, lr: float, seed: int, results: Results
) -> None:
    from capo_verl.experiments.study.config import RunConfig
    from capo_verl.experiments.study.seeds import generator
    from capo_verl.experiments.study.warm_start import base_policy

    model, task = base_policy(
        RunConfig(task=task_name, base=study.base, base_seed=1, seed=seed, layers=study.layers)
    )
    policy = Policy(model, lambda ids: model(ids)[0], model.lm_head, study.layers)
    optimizer = OPTIMIZERS[optimizer_name](policy.parameters.values(), lr=lr)
    predictions = Predictions(policy, CapoConfig(top_k=None, optimizer_model=optimizer_name))
    prompts, sampling = generator(seed, "prompts"), generator(seed, "sampling")
    for step in range(study.steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(1, study.warmup))
        problems = task.problems(study.prompts, prompts).repeat(study.group)
        responses = model.sample(problems.prompts, task.response_length, sampling, task.end)
        rewards = task.reward(problems, responses).double()
        advantages = group_advantages(rewards.view(study.prompts, study.group), 1e-4)
        ids = torch.cat((problems.prompts, responses), 1)
        mask = torch.cat(
            (torch.zeros_like(problems.prompts, dtype=torch.bool), task.mask(responses)), 1
        )
        rollouts = Rollouts(ids.clone(), mask, advantages)
        if step < study.warmup or (step - study.warmup) % study.every or not advantages.any():
            train_step(policy, rollouts, optimizer, predictions)
            continue
        measured = measure_step(policy, rollouts, optimizer, predictions, depths=DEPTHS)
        about = {
            "tier": "tiny", "task": task_name, "optimizer": optimizer_name, "lr": lr, "seed": seed,
            "step": step, "phase": PHASES[int(step >= study.steps // 2)],
        }  # fmt: skip
        record(results, measured, study.tokens_kept, float(rewards.mean()), about)


def record(
    results: Results, measured: Any, tokens_kept: int, reward: float, about: Mapping[str, Any]
) -> None:
    """Add one measured step to the tables."""
    results.steps += tables.step_rows(measured, **about)
    results.batches.append(tables.batch_row(measured, **about, reward=reward))
    kept = {k: about[k] for k in ("tier", "task", "optimizer", "lr", "seed", "step")}
    results.tokens.append(tables.token_rows(measured, tokens_kept, draw=int(about["step"]), **kept))


def runs_by_source(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each tier, task and optimizer, with a name for it."""
    for (tier, task, optimizer), rows in frame.groupby(["tier", "task", "optimizer"], sort=False):
        yield (
            f"{task if tier == 'tiny' else tier}, "
            f"{optimizer.upper() if optimizer == 'sgd' else 'Adam'}",
            rows,
        )
