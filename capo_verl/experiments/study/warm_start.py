# SPDX-License-Identifier: Apache-2.0
"""The base policy of a run: supervised training until sampled accuracy meets a target.

It is cached by its recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from capo_verl.data.cache import cache_root, cached_folder, recipe_hash
from capo_verl.experiments.study.config import RunConfig
from capo_verl.experiments.study.model import ModelConfig, TinyTransformer
from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.stepper import Policy
from capo_verl.experiments.study.tasks import Task, make_task


class _Recipe(TypedDict):
    version: int
    batch: int
    lr: float
    warmup: int
    every: int
    check: int
    max_steps: int
    competence: float
    least: float
    noisy_lr: float
    noisy_every: int
    growth: float


RECIPE: _Recipe = {
    "version": 3, "batch": 128, "lr": 2e-3, "warmup": 50, "every": 20,
    "check": 512, "max_steps": 3000, "competence": 0.9, "least": 0.6,
    "noisy_lr": 5e-4, "noisy_every": 10, "growth": 1.1,
}  # fmt: skip
BISECTIONS = 5
TOKENS = 4096
"""Tokens of demonstrations in a batch, at most.

Long ones hold many examples of every step they teach.
"""


def evaluate(model: Policy, task: Task, prompts: int, seed: int) -> float:
    """Accuracy at temperature 1 on ``prompts`` held-out problems.

    The same seed gives the same problems and random numbers.
    """
    random = generator(seed, "evaluation")
    problems = task.problems(prompts, random, held_out=True)
    correct = 0.0
    for part in range(0, prompts, 512):
        some = type(problems)(*(x[part : part + 512] for x in problems))
        responses = model.sample(some.prompts, task.response_length, random, task.end)
        correct += float(task.correct(some, responses).sum())
    return correct / prompts


def base_policy(config: RunConfig, root: Path | None = None) -> tuple[TinyTransformer, Task]:
    """The run's task, and its model at the accuracy ``config.base``, from the cache where possible.

    ``noisy`` starts from a competent model which all seeds share; the mistakes it learns are the
    seed's. Two processes that need the same model do not both train it.

    Raises:
        RuntimeError: if supervised training does not reach the target.
    """
    task = make_task(config.task, config.task_knobs)
    model = _fresh(task, config, 0 if config.base_kind == "noisy" else config.warm_start["seed"])
    recipe = {"warm_start": config.warm_start, **_recipe(task)}
    load_cached(model, recipe, lambda: _build(model, task, config, root), root)
    return model, task


def competent_policy(config: RunConfig, root: Path | None = None) -> tuple[TinyTransformer, Task]:
    """The policy that the ``noisy`` bases of a task start from.

    It is the same for every seed and every base accuracy.
    """
    task = make_task(config.task, config.task_knobs)
    model = _fresh(task, config, 0)
    recipe = {k: v for k, v in config.warm_start.items() if k not in ("base", "seed", "kind")}
    target = _recipe(task)["competence"]

    def train() -> None:
        _, reached = _train_until(model, task, generator(0, "warm start"), 0, target)
        if reached < RECIPE["least"]:
            raise RuntimeError(_unreached(config, reached, RECIPE["least"]))

    load_cached(model, {"competent": recipe, **_recipe(task)}, train, root)
    return model, task


def _recipe(task: Task) -> dict[str, Any]:
    own = {} if task.competence is None else {"competence": task.competence}
    return {**RECIPE, **own, "batch": min(RECIPE["batch"], max(16, TOKENS // task.response_length))}


def _fresh(task: Task, config: RunConfig, seed: int) -> TinyTransformer:
    length = task.prompt_length + task.response_length
    return TinyTransformer(
        task.vocab_size, length, seed, ModelConfig(layers=config.layers, hidden=config.hidden)
    )


def load_cached(
    model: Policy, recipe: dict[str, Any], train: Callable[[], None], root: Path | None
) -> None:
    """Give ``model`` the cached parameters of a recipe, or those that ``train`` leaves in it."""
    from filelock import FileLock

    def build(folder: Path) -> None:
        train()
        torch.save(model.flat.detach().clone(), folder / "flat.pt")

    root = root or cache_root() / "study"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{recipe_hash(recipe)}.lock"):
        folder, _ = cached_folder("base", recipe, build, root)
    with torch.no_grad():
        model.flat.copy_(torch.load(folder / "flat.pt", weights_only=True))


def _build(model: TinyTransformer, task: Task, config: RunConfig, root: Path | None) -> None:
    seed = config.warm_start["seed"]
    random = generator(seed, "warm start")
    if config.base_kind == "noisy":
        competent = competent_policy(config, root)[0].flat.detach()
        with torch.no_grad():
            model.flat.copy_(competent)
        accuracy = evaluate(model, task, RECIPE["check"], seed)
        if accuracy < config.base:
            raise RuntimeError(_unreached(config, accuracy, config.base))
        before = _unlearn(model, task, random, seed, config.base)
    else:
        before, accuracy = _train_until(model, task, random, seed, config.base)
        if accuracy < config.base:
            raise RuntimeError(_unreached(config, accuracy, config.base))
    _meet(model, task, before, model.flat.detach().clone(), config.base, seed)


def _unreached(config: RunConfig, accuracy: float, target: float) -> str:
    return (
        f"the warm start of task {config.task} {config.task_knobs} reached accuracy {accuracy:.2f} "
        f"in {RECIPE['max_steps']} steps, below {target}"
    )


def _adam(model: TinyTransformer, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([model.flat], lr=lr, betas=(0.9, 0.98), fused=True)


def _train_until(
    model: TinyTransformer, task: Task, random: torch.Generator, seed: int, target: float
) -> tuple[Tensor, float]:
    """Train until an accuracy; returns the parameters of the check before, and the accuracy."""
    optimizer = _adam(model, RECIPE["lr"])
    before, accuracy = model.flat.detach().clone(), 0.0
    for step in range(RECIPE["max_steps"]):
        optimizer.param_groups[0]["lr"] = RECIPE["lr"] * min(1.0, (step + 1) / RECIPE["warmup"])
        supervised_step(model, task, optimizer, random)
        if (step + 1) % RECIPE["every"] == 0:
            accuracy = evaluate(model, task, RECIPE["check"], seed)
            if accuracy >= target:
                break
            before = model.flat.detach().clone()
    return before, accuracy


def _unlearn(
    model: TinyTransformer, task: Task, random: torch.Generator, seed: int, target: float
) -> Tensor:
    """Train on more and more mistakes until accuracy is below the target.

    Returns the parameters before.
    """
    optimizer = _adam(model, RECIPE["noisy_lr"])
    mistakes = 1 - target ** (1 / task.response_length)
    for _ in range(RECIPE["max_steps"] // RECIPE["noisy_every"]):
        before = model.flat.detach().clone()
        for _ in range(RECIPE["noisy_every"]):
            supervised_step(model, task, optimizer, random, mistakes)
        if evaluate(model, task, RECIPE["check"], seed) < target:
            return before
        mistakes = min(0.5, mistakes * RECIPE["growth"])
    raise RuntimeError(
        f"the warm start kept an accuracy above base={target} although half of the demonstrations "
        "were wrong"
    )


def supervised_step(
    model: TinyTransformer,
    task: Task,
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
    mistakes: float = 0.0,
) -> None:
    """One step of cross-entropy on demonstrations.

    The share ``mistakes`` of their tokens comes from the same place of another one.
    """
    problems = task.problems(_recipe(task)["batch"], random)
    answers = task.demonstrations(problems, random)
    if mistakes:
        other = answers[torch.randperm(len(answers), generator=random)]
        answers = torch.where(
            torch.rand(answers.shape, generator=random) < mistakes, other, answers
        )
    imitate(model, problems.prompts, answers, task.mask(answers))
    optimizer.step()


def imitate(
    model: Policy, prompts: Tensor, answers: Tensor, mask: Tensor, clip: float | None = None
) -> None:
    """Leave the gradient of the cross-entropy of answers, of a norm of at most ``clip``.

    Args:
        prompts: ``[B, P]``; answers: ``[B, T]``; mask: ``[B, T]`` bool, their tokens.
    """
    _, logits = model.at_responses(torch.cat((prompts, answers), 1), mask)
    model.gradient.zero_()
    F.cross_entropy(logits, answers[mask]).backward()
    if clip is not None:
        norm = torch.linalg.vector_norm(model.gradient)
        model.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1.0))


def _meet(
    model: TinyTransformer, task: Task, low: Tensor, high: Tensor, target: float, seed: int
) -> None:
    """Leave the parameters between two checkpoints that are closest to the target accuracy.

    The checkpoints are a few steps apart.
    """
    accuracy = evaluate(model, task, RECIPE["check"], seed)
    best, closest, (a, b), rising = high, abs(accuracy - target), (0.0, 1.0), accuracy >= target
    for _ in range(BISECTIONS):
        middle = (a + b) / 2
        with torch.no_grad():
            model.flat.copy_(torch.lerp(low, high, middle))
        accuracy = evaluate(model, task, RECIPE["check"], seed)
        if abs(accuracy - target) < closest:
            best, closest = model.flat.detach().clone(), abs(accuracy - target)
        a, b = (a, middle) if (accuracy >= target) == rising else (middle, b)
    with torch.no_grad():
        model.flat.copy_(best)
