# SPDX-License-Identifier: Apache-2.0
"""Checkpoint that ``resume_mode=auto`` continues from, after a run was killed while saving.

verl keeps that number in a file which it first empties and then writes
(``verl/trainer/ppo/v1/trainer_base.py``, ``_save_checkpoint``). Killed in between, or with the
folder gone that the file names, the next run would end with ``invalid literal for int()``, or
silently start from scratch.
"""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo_verl.utils import TRACKER, replace_text

logger = logging.getLogger(__name__)

LAST_FILE = "data.pt"
"""File that verl writes last into a checkpoint, after all ranks have written theirs."""


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder`` that were written to their end, oldest first."""
    found = []
    for path in folder.glob("global_step_*"):
        step = re.fullmatch(r"global_step_(\d+)", path.name)
        # The table of contents is at the end of torch's files.
        if step and (path / "actor").is_dir() and zipfile.is_zipfile(path / LAST_FILE):
            found.append(int(step.group(1)))
    return sorted(found)


def repair_tracker(folder: Path) -> int | None:
    """Let the tracker name the newest complete checkpoint, if it names none that is there.

    Returns:
        The step it names now, None if there is nothing to resume from.

    Raises:
        ValueError: if it is unusable and no checkpoint in ``folder`` is complete: then something
            else was lost.
    """
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if text.isdecimal() and (folder / f"global_step_{text}").is_dir():
        return int(text)
    steps = complete_steps(folder)
    if not steps:
        raise ValueError(
            f"{tracker} holds {text!r}, and no complete checkpoint is beside it: restore one, or "
            "delete the file to start anew"
        )
    replace_text(tracker, str(steps[-1]))
    logger.warning(
        "%s held %r; it names the newest complete checkpoint again, step %d",
        tracker,
        text,
        steps[-1],
    )
    return steps[-1]


def checkpoint_folder(config: DictConfig) -> Path | None:
    """Folder of a run's checkpoints; None if that is not on a file system."""
    folder = OmegaConf.select(config, "trainer.default_local_dir")
    return Path(folder).absolute() if folder and "://" not in folder else None


def check_resume(config: DictConfig) -> None:
    """Call :func:`repair_tracker` for a run that would resume by itself.

    Raises:
        ValueError: see there.
    """
    folder = checkpoint_folder(config)
    asynchronous = OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.async_save")
    if OmegaConf.select(config, "trainer.resume_mode") == "auto" and folder and not asynchronous:
        repair_tracker(folder)
