# SPDX-License-Identifier: Apache-2.0
"""Stop a run after the current step, with a checkpoint: ``touch CHECKPOINTS/stop``.

The trainer is a Ray actor on any node, so a signal to the driver cannot reach it; a file on the
filesystem of the checkpoints can. The trainer looks for it once per step, obeys it and removes it.
Slurm's warning before preemption or the end of the wall time becomes this file
(``examples/slurm/train.sbatch``).
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from capo_verl.utils import replace_text

logger = logging.getLogger(__name__)

TRAINERS = {
    "sync": "PPOTrainerSync",
    "colocate_async": "PPOTrainerColocateAsync",
    "separate_async": "PPOTrainerSeparateAsync",
}
"""Class of each ``trainer.v1.trainer_mode``, in ``verl.trainer.ppo.v1.trainer_MODE``."""
REQUEST = "stop"
"""Name of the file in ``trainer.default_local_dir``."""
PROGRESS = "progress.json"
"""Name of the file there that says how far the run has come."""
_STATE = "_capo_verl_progress"


@dataclass(frozen=True)
class Progress:
    """Progress of a run after a training step."""

    step: int
    """The last step that was trained, counted from 1."""
    total_steps: int
    checkpoint: int | None
    """Step of the newest checkpoint that this attempt has written, None before the first."""
    step_seconds: float
    """The longest step of this attempt, with its checkpoint."""
    stopped: bool = False
    """The run ends here because it was asked to, not because it is complete."""

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps and not self.stopped

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Replace the file in ``folder``, which is made if missing.

        A reader never sees half of it.
        """
        path = Path(folder) / PROGRESS
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Progress | None:
        """State that the last step left in ``folder``; None before the first one.

        Raises:
            ValueError: if the file holds something else.
        """
        return cls.read_file(Path(folder) / PROGRESS)

    @classmethod
    def read_file(cls, path: Path) -> Progress | None:
        """State in a file; None if there is none.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            found = cls(**json.loads(path.read_text("utf-8")))
            numbers = (found.step, found.total_steps, found.checkpoint or 0, found.step_seconds)
            if not all(type(number) in (int, float) for number in numbers):
                raise TypeError("a step that is no number")
        except FileNotFoundError:
            return None
        except (TypeError, ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not what a run writes there ({e}); delete it") from e
        return found


def install(module: ModuleType) -> None:
    """Let the trainer of one of verl's V1 modules look for the request after each step, and write
    its state.
    """
    (trainer,) = (vars(module)[name] for name in TRAINERS.values() if name in vars(module))
    on_step_begin, on_step_end = trainer.on_step_begin, trainer.on_step_end

    def begin(self: Any) -> None:
        on_step_begin(self)
        fresh = {"longest": 0.0, "checkpoint": None, "total": self.total_training_steps}
        state = self.__dict__.setdefault(_STATE, fresh)
        state["started"] = time.monotonic()

    def end(self: Any) -> None:
        # Before the weights go to the rollout servers: a checkpoint of this step is written where
        # verl writes one.
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
        logger.warning(
            "stop requested by %s: with async_save the newest complete checkpoint counts", request
        )
    elif "save_checkpoint" not in trainer.timing_raw:
        started = time.monotonic()
        trainer._save_checkpoint()
        trainer.timing_raw["save_checkpoint"] = time.monotonic() - started
    logger.warning(
        "stopping after step %d of %d, as %s asks for",
        trainer.global_steps,
        trainer.total_training_steps,
        request,
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
