# SPDX-License-Identifier: Apache-2.0
"""Completions by verl's rollout servers: vLLM or SGLang on GPUs, "hf" on a CPU.

They are the servers that training uses.

verl's own ``main_generation_server`` posts to the servers' OpenAI endpoint, which the CPU's server
does not have, and keeps everything until the end. This takes its servers (``LLMServerManager``,
standalone) and the token interface of training.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from capo_verl.data.evaluation.completions import Completion
from capo_verl.data.evaluation.problems import Problem

Task = tuple[Problem, int, list[int]]
"""Problem, number of the sample, prompt in tokens."""


@dataclass(frozen=True)
class ServerConfig:
    """Settings that the rollout servers are started with."""

    model: str
    backend: str
    """verl's ``rollout.name``: vllm, sglang, hf."""
    gpus_per_node: int
    nodes: int
    tensor_parallel: int
    max_prompt_length: int
    max_response_length: int
    seed: int
    overrides: tuple[str, ...] = ()
    """Further ``key=value`` for verl's config."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(
                "no GPU was found: say how many by --gpus, or set VERL_PLATFORM=cpu for --backend "
                "hf"
            )
        if self.gpus_per_node * self.nodes % self.tensor_parallel:
            raise ValueError(
                f"--gpus {self.gpus_per_node} x --nodes {self.nodes} does not divide into servers "
                f"of --tp {self.tensor_parallel}"
            )


def compose_config(server: ServerConfig) -> Any:
    """verl's trainer config with the rollout's part set.

    Raises:
        ValueError: for an override that the config does not have.
    """
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    rollout = "actor_rollout_ref.rollout"
    settings: dict[str, str | int] = {
        "actor_rollout_ref.model.path": server.model,
        f"{rollout}.name": server.backend,
        f"{rollout}.load_format": "auto",  # verl's default waits for a trainer to send weights
        f"{rollout}.nnodes": server.nodes,
        f"{rollout}.n_gpus_per_node": server.gpus_per_node,
        f"{rollout}.tensor_model_parallel_size": server.tensor_parallel,
        f"{rollout}.prompt_length": server.max_prompt_length,
        f"{rollout}.response_length": server.max_response_length,
        f"{rollout}.seed": server.seed,
    }
    folder = os.path.join(os.path.dirname(verl.trainer.__file__), "config")
    try:
        with initialize_config_dir(folder, version_base=None):
            overrides = [
                *(f"{key}={_quoted(value)}" for key, value in settings.items()),
                *server.overrides,
            ]
            config = compose("ppo_trainer", overrides=overrides)
        OmegaConf.resolve(config)
    except HydraException as error:
        raise ValueError(
            f"verl's config refuses {' '.join(server.overrides)}: {str(error).splitlines()[0]}"
        ) from error
    return config


def _quoted(value: str | int) -> str:
    return (
        "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        if isinstance(value, str)
        else str(value)
    )


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: if the model has no tokenizer with a chat template.
    """
    from capo_verl.data import lengths

    return lengths.load_tokenizer(model, "--model")


def tokenize(problems: Sequence[Problem], tokenizer: Any, limit: int) -> dict[str, list[int]]:
    """Prompts in tokens, by problem.

    Raises:
        ValueError: if one is longer than ``limit``.
    """
    from verl.utils import normalize_token_ids

    prompts = {
        p.key: list(
            normalize_token_ids(
                tokenizer.apply_chat_template(p.prompt, add_generation_prompt=True, tokenize=True)
            )
        )
        for p in problems
    }
    longest = max(map(len, prompts.values()))
    if longest > limit:
        count = sum(len(prompt) > limit for prompt in prompts.values())
        raise ValueError(
            f"{count} prompts are longer than --max-prompt-length {limit}; the longest has "
            f"{longest} tokens"
        )
    return prompts


def generate(
    config: Any,
    tasks: Sequence[Task],
    sampling: dict[str, Any],
    tokenizer: Any,
    concurrency: int,
    receive: Callable[[Completion], None],
) -> None:
    """Start the servers, answer every task, stop the servers.

    ``receive`` gets the completions as they come, in this thread.

    Raises:
        Exception: whatever a server raises; completions received before are kept.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized()
    if started:
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        ray.init(
            runtime_env=dict(get_ppo_ray_runtime_env(config)),
            **({} if address else _local_cluster(config)),
        )
    try:
        asyncio.run(_generate(config, tasks, sampling, tokenizer, concurrency, receive))
    finally:
        if started:
            ray.shutdown()


def _local_cluster(config: Any) -> dict[str, Any]:
    rollout = config.actor_rollout_ref.rollout
    arguments: dict[str, Any] = {"include_dashboard": False}
    if os.environ.get("VERL_PLATFORM") == "cpu":
        # Ray's counts, not the machine's: one made-up GPU per rank (capo_verl/cpu/platform.py),
        # CPUs for verl's helpers.
        arguments |= {"num_gpus": rollout.n_gpus_per_node, "num_cpus": max(8, os.cpu_count() or 1)}
    return arguments


async def _generate(
    config: Any, tasks: Sequence[Task], sampling: dict[str, Any], tokenizer: Any, concurrency: int,
    receive: Callable[[Completion], None],
) -> None:  # fmt: skip
    from verl.workers.rollout.llm_server import LLMServerManager

    # Not its create(): that runs an event loop of its own.
    manager = LLMServerManager(config)
    await manager._initialize_llm_servers()
    await manager._init_global_load_balancer()
    client = manager.get_client()
    limit = config.actor_rollout_ref.rollout.response_length
    waiting = iter(tasks)

    async def worker() -> None:
        for problem, sample, prompt in waiting:
            parameters = {**sampling, "max_tokens": limit}
            output = await client.generate(
                f"{problem.key}-{sample}", prompt_ids=prompt, sampling_params=parameters
            )
            tokens = list(output.token_ids)
            # The servers disagree about the word for it; a full budget without an end token is what
            # it means.
            truncated = len(tokens) >= limit and tokens[-1] != tokenizer.eos_token_id
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            receive(Completion(problem.key, sample, text, len(tokens), truncated))

    async with _all_or_none() as start:
        for _ in range(min(concurrency, len(tasks))):
            start(worker())


class _all_or_none:  # noqa: N801 - asyncio.TaskGroup is not in Python 3.10
    """Waits for all coroutines; the first error cancels the others and is raised."""

    async def __aenter__(self) -> Callable[[Any], None]:
        self._tasks: list[asyncio.Task[None]] = []
        return lambda coroutine: self._tasks.append(asyncio.create_task(coroutine))

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
