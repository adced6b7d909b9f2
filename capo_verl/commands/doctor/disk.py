# SPDX-License-Identifier: Apache-2.0
"""Room on the disk for the example's checkpoints."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from capo_verl.commands.doctor.check import OK, SKIPPED, WARN, Broken, Outcome
from capo_verl.launch import plan_memory
from capo_verl.launch.plan import GIB, Plan
from capo_verl.plugin.checks.resume import checkpoint_folder
from capo_verl.plugin.checks.run_spec import ACTOR


def checkpoint_bytes(plan: Plan, contents: Sequence[str]) -> int:
    """Estimated size of one checkpoint: weights, optimizer, CAPO's moments, each once, whatever the
    layout.

    The weights as the trainer holds them, bfloat16 under Megatron on GPUs, else float32; the
    optimizer's state as well, but Megatron's distributed optimizer adds a float32 copy of the
    weights in float32 training, too (``sharded_param_state_fully_sharded_model_space`` in
    ``megatron/core/optimizer/distrib_optimizer.py``).

    Args:
        contents: ``actor.checkpoint.save_contents``; ``hf_model`` beside ``model`` is a second copy
            of the weights.
    """
    alone = replace(plan.run, nodes=1, gpus_per_node=1, tp=1, pp=1, vpp=1, cp=1)
    states = plan_memory.states(alone, plan.shape, 0)
    optimizer = states.optimizer
    if alone.engine == "megatron" and alone.distributed_optimizer:
        optimizer = plan.shape.parameters() * (plan_memory.FLOAT32 + plan_memory.ADAM_MOMENTS)
    copies = len({"model", "hf_model"}.intersection(contents))
    return (
        copies * states.parameters
        + ("optimizer" in contents) * optimizer
        + plan_memory.capo_filter(alone, plan.shape).moments
    )


def checkpoints(config: DictConfig) -> int | None:
    """Number that is on the disk at once, at most; None if the number of steps is not known."""
    every, keep = config.trainer.save_freq, config.trainer.max_actor_ckpt_to_keep
    total = config.trainer.total_training_steps
    written = None if total is None else math.ceil(total / every)
    if not keep:
        return written
    # The only one that is kept is deleted after the next has been written
    # (``verl/utils/checkpoint/checkpoint_manager.py``).
    kept = 2 if keep == 1 else keep
    return kept if written is None else min(kept, written)


def compare(plan: Plan | None, config: DictConfig, on_the_spot: bool) -> Outcome:
    """
    Args:
        plan: of the example; None if the sizes of its model are not known.
        config: of the example, verl's whole one.
        on_the_spot: whether this is a machine that could run it; if not, its disks may be others.

    Raises:
        Broken: if this machine would run it and cannot write there, or has no room for one
            checkpoint.
    """
    folder = checkpoint_folder(config)
    if (config.trainer.save_freq or 0) <= 0:
        return Outcome(
            OK,
            "no checkpoints are written (trainer.save_freq; SAVE_FREQ=N writes one every N steps)",
        )
    if folder is None:
        return Outcome(
            SKIPPED,
            f"{config.trainer.default_local_dir} is not on a file system: look there yourself",
        )
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return _lacking(
            f"{existing} cannot be written to: set OUTPUT_DIR to a folder of yours", on_the_spot
        )
    free = shutil.disk_usage(existing).free / GIB
    if plan is None:
        return Outcome(
            SKIPPED,
            f"{free:.1f} GiB are free at {existing}; the size of a checkpoint of this model is not "
            "known",
        )
    contents = OmegaConf.select(config, f"{ACTOR}.checkpoint.save_contents") or []
    one, count = checkpoint_bytes(plan, contents) / GIB, checkpoints(config)
    what = (
        f"estimated: {one:.2g} GiB a checkpoint"
        if one < 10
        else f"estimated: {one:.0f} GiB a checkpoint"
    )
    what += f", {count} at once" if count else f", one every {config.trainer.save_freq} steps"
    where = f"{free:.1f} GiB are free at {existing}"
    if one > free:
        return _lacking(
            f"{what}, but {where}: free some, or set OUTPUT_DIR to a larger disk", on_the_spot
        )
    if one * (count or 1) > free:
        return Outcome(
            WARN,
            f"{what}, but {where}: free some, set OUTPUT_DIR to a larger disk, or MAX_CKPT_TO_KEEP",
        )
    return Outcome(OK, f"{what}, {where}")


def _lacking(message: str, on_the_spot: bool) -> Outcome:
    if on_the_spot:
        raise Broken(message)
    return Outcome(WARN, message)
