# SPDX-License-Identifier: Apache-2.0
"""The base policy of a task: a few steps of supervised training, and the mean of two such runs.

It is cached by its recipe, and the same for every seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from capo_verl.experiments.study.pretrained.config import PretrainedConfig
from capo_verl.experiments.study.pretrained.model import TextPolicy, load
from capo_verl.experiments.study.pretrained.tasks import TextTask, make_text_task
from capo_verl.experiments.study.pretrained.vocabulary import vocabulary
from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.warm_start import imitate, load_cached

VERSION = 1
WORDINGS = 2
"""Of each problem in a batch."""
WARMUP, DECAY, LEAST = 6, 0.6, 0.1
"""Steps of linear warm-up; share of the run after which the rate falls linearly, to which share."""


def warm_started(config: PretrainedConfig, root: Path | None = None) -> tuple[TextPolicy, TextTask]:
    """The run's base policy, from the cache where possible, and its task.

    LoRA's adapters start on top of it.
    """
    words = vocabulary(config.model)
    task = make_text_task(config.task, config.task_knobs, words)
    base = load(config.model, words)
    recipe = {**task.sft, **config.sft}
    load_cached(
        base, {"version": VERSION, **config.warm_start, "sft": recipe},
        lambda: _average(base, task, recipe), root,
    )  # fmt: skip
    if config.lora is None:
        return base, task
    torch.manual_seed(config.seed)  # of the adapters
    return TextPolicy(base.module, words.pad, config.lora), task


def _average(model: TextPolicy, task: TextTask, recipe: dict[str, Any]) -> None:
    """Leave the mean of runs of ``recipe["steps"]`` steps."""
    start = model.flat.detach().clone()
    total = torch.zeros_like(start)
    for steps in recipe["steps"]:
        with torch.no_grad():
            model.flat.copy_(start)
        _train(model, task, recipe, steps)
        total += model.flat.detach()
    with torch.no_grad():
        model.flat.copy_(total / len(recipe["steps"]))


def _train(model: TextPolicy, task: TextTask, recipe: dict[str, Any], steps: int) -> None:
    random = generator(0, "warm start")
    optimizer = torch.optim.AdamW([model.flat], weight_decay=0.0, fused=True)
    for step in range(steps):
        left = (steps - step) / ((1 - DECAY) * steps)
        decay = 1.0 if step < DECAY * steps else max(LEAST, left)
        rate = recipe["lr"] * min(1.0, (step + 1) / WARMUP) * decay
        optimizer.param_groups[0]["lr"] = rate
        problems = task.problems(recipe["batch"], random).repeat(WORDINGS)
        answers = task.demonstrations(problems, random)
        imitate(model, problems.prompts, answers, task.mask(answers), clip=1.0)
        optimizer.step()
