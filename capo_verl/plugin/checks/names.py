# SPDX-License-Identifier: Apache-2.0
"""Names in a run's configuration that nothing registers under."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.checks.run_spec import ACTOR, MODEL, ROLLOUT
from capo_verl.plugin.state import on_cpu

FOR_GPUS = ("sglang", "trtllm")


def check_names(config: DictConfig) -> None:
    """Check the names of the loss, of the rollout engine and of the way to resume.

    Raises:
        ValueError: for an unknown loss, rollout engine or way to resume, with those there are.
    """
    for problem in _unknown(config):
        raise ValueError(problem)


def _unknown(config: DictConfig) -> Iterator[str]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    loss = OmegaConf.select(config, f"{ACTOR}.policy_loss.loss_mode")
    # A module named here may register more, in the workers.
    if loss not in POLICY_LOSS_REGISTRY and not OmegaConf.select(config, f"{MODEL}.external_lib"):
        choices = ", ".join(sorted(POLICY_LOSS_REGISTRY))
        yield f"{ACTOR}.policy_loss.loss_mode={loss}: choose one of {choices}"
    rollout = OmegaConf.select(config, f"{ROLLOUT}.name")
    if rollout == "hf" and not on_cpu():
        yield (
            f"{ROLLOUT}.name=hf runs on CPUs only: set VERL_PLATFORM=cpu, or choose vllm or sglang"
        )
    elif rollout in FOR_GPUS and on_cpu():
        yield f"{ROLLOUT}.name={rollout} runs on GPUs only: choose hf or vllm"
    elif (
        rollout and (rollout, OmegaConf.select(config, f"{ROLLOUT}.mode")) not in _ROLLOUT_REGISTRY
    ):
        choices = ", ".join(sorted(name for name, _ in _ROLLOUT_REGISTRY))
        yield f"{ROLLOUT}.name={rollout}: choose one of {choices}"
    resume = OmegaConf.select(config, "trainer.resume_mode")
    if resume not in ("auto", "disable", "resume_path"):
        yield f"trainer.resume_mode={resume}: choose one of auto, disable, resume_path"
