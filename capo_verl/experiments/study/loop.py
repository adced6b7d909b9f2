# SPDX-License-Identifier: Apache-2.0
"""The training loop of the tiny and of the pretrained tier: sample, score, filter, step, measure.

The method itself is capo_verl.core's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.data.cache import cache_root
from capo_verl.experiments.study.config import LoopConfig, RunConfig
from capo_verl.experiments.study.objective import group_advantages
from capo_verl.experiments.study.pretrained.config import PretrainedConfig
from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.stepper import Policy, Rollout, Seen, Stepper
from capo_verl.experiments.study.tasks import Task
from capo_verl.experiments.study.warm_start import base_policy, evaluate
from capo_verl.utils import replace_text


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


@dataclass
class Trained:
    """Results of a run."""

    curve: list[dict[str, float]]
    """Rows by evaluation; the first is the base policy, after 0 steps."""
    factors: list[float]
    """Factor of the learning rate in every optimizer step."""
    dropped: list[int]
    """Response tokens that were left out of the loss in every optimizer step."""
    steps: list[dict[str, float]]
    """Measurements of every optimizer step, if the tier keeps them."""


def train(
    config: LoopConfig,
    cache: Path | None = None,
    watch: Callable[[int, Stepper], None] | None = None,
) -> Trained:
    """One run of the tiny or the pretrained tier.

    Args:
        cache: folder of the warm starts; by default in :func:`capo_verl.data.cache.cache_root`.
        watch: called after every rollout with its number.

    Raises:
        FloatingPointError: if the parameters are no numbers any more.
    """
    foreign = _foreign(config, cache)
    torch.manual_seed(config.seed)  # for verl's clip_cov, which draws from torch's own generator
    model, task = load_policy(config, cache)
    stepper = Stepper(config, model, foreign.scales, foreign.drops)
    prompts, sampling = generator(config.seed, "prompts"), generator(config.seed, "sampling")
    record = _token_records(config, task, cache)
    curve, trained, start = Curve(), Trained([], [], [], []), time.perf_counter()
    curve.close(
        step=0, completions=0, tokens=0, accepted_tokens=0, seconds=0.0,
        accuracy=evaluate(model, task, config.eval_prompts, config.seed),
    )  # fmt: skip
    evaluations = set(evaluation_steps(config.steps, config.evaluations))
    tokens = accepted = 0
    for step in range(config.steps):
        begun = time.perf_counter()
        problems = task.problems(config.prompts, prompts).repeat(config.group)
        responses = model.sample(problems.prompts, task.response_length, sampling, task.end)
        rewards = task.reward(problems, responses)
        rollout = Rollout(
            tokens=torch.cat((problems.prompts, responses), 1),
            mask=task.mask(responses),
            advantages=group_advantages(rewards, config.group, config.advantage),
            group=torch.arange(config.prompts).repeat_interleave(config.group),
        )
        of_rollout = {"reward": rewards.mean(), "length": rollout.mask.sum(-1).float().mean()}
        if task.end is not None:
            ended = (responses == task.end) & rollout.mask
            of_rollout["ended"] = ended.any(-1).float().mean()
        curve.add(**of_rollout)
        for measured in stepper.update(rollout):
            if config.keeps_steps:
                seconds = time.perf_counter() - begun
                row = {"step": stepper.steps, "rollout": step + 1, "seconds": seconds}
                trained.steps.append(_numbers({**row, **of_rollout, **measured}))
            if record is not None and stepper.last is not None:
                record(stepper.steps, stepper.last)
            count, kept = int(measured.pop("tokens")), int(measured.pop("accepted_tokens"))
            tokens, accepted = tokens + count, accepted + kept
            trained.dropped.append(count - kept)
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
    trained.curve, trained.factors = curve.rows, stepper.factors
    if config.keeps_steps:
        replace_text(_trace(config, cache), json.dumps(asdict(trained)))
    return trained


def _token_records(
    config: LoopConfig, task: Task, cache: Path | None
) -> Callable[[int, Seen], None] | None:
    if not isinstance(config, PretrainedConfig) or config.tokens_every is None:
        return None
    from capo_verl.experiments.study.pretrained.tasks import TextTask
    from capo_verl.experiments.study.pretrained.token_records import TokenRecords

    assert isinstance(task, TextTask) and config.capo is not None
    folder = (cache or cache_root() / "study") / "tokens" / config.run_id
    records = TokenRecords(folder, task.vocabulary, config.capo.get("mode", "filter"))
    every = config.tokens_every

    def record(step: int, seen: Seen) -> None:
        if (step - 1) % every == 0:
            records.write(step, seen)

    return record


def load_policy(config: LoopConfig, cache: Path | None = None) -> tuple[Policy, Task]:
    """The warm-started policy of a run, and its task."""
    if isinstance(config, PretrainedConfig):
        from capo_verl.experiments.study.pretrained.warm_start import warm_started

        return warm_started(config, cache)
    assert isinstance(config, RunConfig)
    return base_policy(config, cache)


def _numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in measured.items() if value is not None}


class _Foreign(NamedTuple):
    """Records of a second run that a control takes over, by optimizer step."""

    scales: list[float] | None = None
    drops: list[int] | None = None


def _foreign(config: LoopConfig, cache: Path | None) -> _Foreign:
    scales, drops = None, None
    if config.drops_of is not None:
        drops = _other(config, config.drops_of, cache).dropped
    if config.lr_scales_of is not None:
        factors = _other(config, config.lr_scales_of, cache).factors
        if config.lr_scales == "mean":
            scales = [sum(factors) / len(factors)] * len(factors)
        else:
            order = torch.randperm(
                len(factors), generator=generator(config.seed, "shuffled scales")
            )
            scales = [factors[i] for i in order.tolist()]
    return _Foreign(scales, drops)


def _other(config: LoopConfig, settings: Mapping[str, Any], cache: Path | None) -> Trained:
    """A run with other settings: what an earlier one left, or run now."""
    plain = replace(config, lr_scales_of=None, lr_scales="mean", drops_of=None)
    source = type(config).from_mapping({**plain.to_dict(), **settings})
    path = _trace(source, cache)
    if source.keeps_steps and path.exists():
        return Trained(**json.loads(path.read_text(encoding="utf-8")))
    return train(source, cache)


def _trace(config: LoopConfig, cache: Path | None) -> Path:
    """Folder in which a run leaves what other runs may take from it."""
    folder = (cache or cache_root() / "study") / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{config.run_id}.json"
