# SPDX-License-Identifier: Apache-2.0
"""Requirements of ``trainer.v1.trainer_mode=separate_async``: verl asserts most of them in its
trainer, after Ray has started (``verl/trainer/ppo/v1/trainer_separate_async.py:49``).
"""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.checks.run_spec import ACTOR, MODEL, ROLLOUT
from capo_verl.plugin.state import on_cpu
from capo_verl.plugin.stop import TRAINERS

MODE = "trainer.v1.trainer_mode"
STEPS = "trainer.v1.separate_async.parameter_sync_step"
BACKEND = f"{ROLLOUT}.checkpoint_engine.backend"


def check_trainer_mode(config: DictConfig) -> None:
    """Check the trainer, and the settings that it needs.

    Raises:
        ValueError: naming key and value, and what to set.
    """
    mode = OmegaConf.select(config, MODE)
    if mode is None or OmegaConf.select(config, "trainer.use_v1") is False:
        return
    if mode not in TRAINERS:
        raise ValueError(f"{MODE}={mode}: set it to one of {', '.join(TRAINERS)}")
    backend = OmegaConf.select(config, BACKEND)
    if on_cpu() and backend not in ("naive", "gloo"):
        raise ValueError(
            f"{BACKEND}={backend} sends between GPUs; on a CPU set it to naive or gloo"
        )
    if mode == "separate_async":
        for problem in _separate(config):
            raise ValueError(f"{MODE}={mode}: {problem}")


def _separate(config: DictConfig) -> Iterator[str]:
    def value(key: str) -> object:
        return OmegaConf.select(config, key)

    for key in (f"{ROLLOUT}.nnodes", f"{ROLLOUT}.n_gpus_per_node"):
        if not value(key):
            yield f"{key}={value(key)}: set it to the number the rollout servers have to themselves"
    prompts, mini_batch, steps = (
        value(key) for key in ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", STEPS)
    )
    if isinstance(mini_batch, int) and isinstance(steps, int) and prompts != mini_batch * steps:
        yield (
            f"data.train_batch_size={prompts} must be {STEPS}={steps} x "
            f"{ACTOR}.ppo_mini_batch_size={mini_batch} = {mini_batch * steps}: change one of them"
        )
    if value(BACKEND) == "naive":
        needed = "gloo" if on_cpu() else "nccl"
        yield f"{BACKEND}=naive reaches no server of another process; set it to {needed}"
    if (value(f"{MODEL}.lora.rank") or value(f"{MODEL}.lora_rank")) and not value(
        f"{MODEL}.lora.merge"
    ):
        # verl/workers/engine_workers.py:764 sends get_per_tensor_param() without adapters.
        yield (
            f"the adapters would not reach the rollout servers; set {MODEL}.lora.merge=True, or "
            f"{MODE}=colocate_async"
        )
    if (
        value(f"{ACTOR}.strategy") == "megatron"
        and value(f"{ACTOR}.megatron.use_distributed_optimizer") is False
        and not value("algorithm.rollout_correction.bypass_mode")
    ):
        yield (  # verl/utils/megatron_utils.py:1936
            "verl keeps the last synchronised weights in buffers of the distributed optimizer; set "
            f"{ACTOR}.megatron.use_distributed_optimizer=True, or "
            "algorithm.rollout_correction.bypass_mode=True"
        )
