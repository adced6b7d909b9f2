# SPDX-License-Identifier: Apache-2.0
"""Stop a run after the current step, with a checkpoint: ``touch CHECKPOINTS/stop``.

The trainer is a Ray actor on any node, so a signal to the driver cannot reach it; a file on the filesystem of the checkpoints
can. The trainer looks for it once per step, obeys it and removes it. Slurm's warning before preemption or the end of the wall
time becomes this file (``examples/slurm/train.sbatch``).
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from capo_verl.launch.progress import Progress

logger = logging.getLogger(__name__)

REQUEST = "stop"
"""Name of the file in ``trainer.default_local_dir``."""
_STATE = "_capo_verl_progress"


def install(module: ModuleType) -> None:
    """Let verl's synchronous trainer look for the request at the end of each step, and write how far it has come."""
    trainer = module.PPOTrainerSync
    on_step_begin, on_step_end = trainer.on_step_begin, trainer.on_step_end

    def begin(self: Any) -> None:
        on_step_begin(self)
        fresh = {"longest": 0.0, "checkpoint": None, "total": self.total_training_steps}
        state = self.__dict__.setdefault(_STATE, fresh)
        state["started"] = time.monotonic()

    def end(self: Any) -> None:
        # Before the weights go to the rollout servers: a checkpoint of this step is written where verl writes one.
        stopped = _obey(self)
        on_step_end(self)
        _report(self, stopped)

    trainer.on_step_begin, trainer.on_step_end = begin, end


def _folder(trainer: Any) -> Path:
    return Path(os.path.abspath(trainer.config.trainer.default_local_dir))


def _obey(trainer: Any) -> bool:
    """Save and make this the last step, if asked to."""
    request = _folder(trainer) / REQUEST
    if not request.exists():
        return False
    if trainer.global_steps >= trainer.total_training_steps:
        request.unlink()  # it ends anyway; a longer run that resumes from here must not
        return False
    # With Megatron's asynchronous checkpoints the process must not end while one is being written.
    if OmegaConf.select(trainer.config, "actor_rollout_ref.actor.checkpoint.async_save"):
        logger.warning("stop requested by %s: with async_save the newest complete checkpoint counts", request)
    elif "save_checkpoint" not in trainer.timing_raw:
        started = time.monotonic()
        trainer._save_checkpoint()
        trainer.timing_raw["save_checkpoint"] = time.monotonic() - started
    logger.warning(
        "stopping after step %d of %d, as %s asks for", trainer.global_steps, trainer.total_training_steps, request
    )
    trainer.total_training_steps = trainer.global_steps  # ends verl's loop
    request.unlink()
    return True


def _report(trainer: Any, stopped: bool) -> None:
    state = getattr(trainer, _STATE)
    state["longest"] = max(state["longest"], time.monotonic() - state["started"])
    if "save_checkpoint" in trainer.timing_raw:
        state["checkpoint"] = trainer.global_steps
    Progress(
        step=trainer.global_steps,
        total_steps=state["total"],
        checkpoint=state["checkpoint"],
        step_seconds=round(state["longest"], 3),
        stopped=stopped,
    ).write(_folder(trainer))
