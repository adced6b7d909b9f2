# SPDX-License-Identifier: Apache-2.0
"""A batch of a user's model and data: completions at temperature 1, rewards, GRPO's advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capo_verl.commands.calibrate.rollouts import Rollouts, group_advantages, pack
from capo_verl.data.evaluation.completions import Completion
from capo_verl.data.evaluation.problems import Problem
from capo_verl.data.evaluation.scoring import Reward, score_all


@dataclass(frozen=True)
class Sampled:
    """Answers to G problems, n each."""

    rollouts: Rollouts
    rewards: Tensor
    """``[G, n]`` float64."""
    truncated: float
    """Share of the responses that ended for lack of room."""

    @property
    def has_signal(self) -> bool:
        """True if the rewards differ within any group: if not, every advantage is 0."""
        return bool((self.rewards.amax(1) > self.rewards.amin(1)).any())


def load_reward(spec: str | None, problems: Sequence[Problem]) -> Reward:
    """The reward function, tried once on each data source.

    Args:
        spec: ``module:function`` or ``file.py:function`` in the signature of verl's
            ``custom_reward_function``. None = by data source: reasoning-gym's scorer for
            ``reasoning_gym/*``, verl's own for those it knows.

    Raises:
        ValueError: if it cannot be loaded, or does not score a data source.
    """
    if spec is None:
        reward: Reward = by_data_source
    else:
        path, colon, name = spec.rpartition(":")
        if not colon or not path or not name:
            raise ValueError(f"--reward {spec}: expected module:function or file.py:function")
        from capo_verl.data.evaluation.pipeline import load_reward as load

        reward = load(path if path.endswith(".py") else f"pkg://{path}", name)
    for problem in {p.data_source: p for p in problems}.values():
        try:
            reward(
                data_source=problem.data_source, solution_str="", ground_truth=problem.ground_truth,
                extra_info=dict(problem.extra_info),
            )  # fmt: skip
        except Exception as error:
            raise ValueError(
                f"--data: no reward for data_source={problem.data_source!r} "
                f"({type(error).__name__}: {error}); name one by --reward module:function"
            ) from error
    return reward


def by_data_source(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> Any:
    """reasoning-gym's scorer or verl's own, by data source.

    Raises:
        NotImplementedError: if verl does not know the data source.
    """
    from capo_verl.data import gym

    if data_source.startswith(gym.SOURCE_PREFIX):
        return gym.compute_score(data_source, solution_str, ground_truth, extra_info)
    from verl.utils.reward_score import default_compute_score

    return default_compute_score(data_source, solution_str, ground_truth, extra_info)


def sample(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    n: int,
    max_response_length: int,
    reward: Reward,
    generator: torch.Generator,
    threads: int = 4,
) -> Sampled:
    """Sample n completions per problem from a Hugging Face model at temperature 1 and score them.

    Args:
        prompts: token ids, one list per problem.
        generator: on the model's device.

    Raises:
        ValueError: if a reward is not a finite number.
    """
    from capo_verl.cpu.rollout.sampling import SamplingRequest, generate_batch

    stops = _stop_tokens(model, tokenizer)
    requests = [
        SamplingRequest(prompt, max_response_length, stop_token_ids=stops)
        for prompt in prompts
        for _ in range(n)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    with model.device:  # where the sampler makes its tensors
        completions = generate_batch(model, requests, pad, generator)
    scored = {}
    for i, completion in enumerate(completions):
        key, number = problems[i // n].key, i % n
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        cut = completion.finish_reason != "stop"
        scored[key, number] = Completion(key, number, text, len(completion.token_ids), cut)
    records = score_all(problems, scored, reward, threads)
    rewards = torch.tensor([float(r["score"]) for r in records], dtype=torch.float64).view(
        len(problems), n
    )
    if not rewards.isfinite().all():
        raise ValueError("--reward: returned a score that is not finite")
    rollouts = pack(
        [list(prompt) for prompt in prompts for _ in range(n)],
        [c.token_ids for c in completions],
        group_advantages(rewards),
        pad,
    ).to(model.device)
    return Sampled(rollouts, rewards, sum(r["truncated"] for r in records) / len(records))


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})
