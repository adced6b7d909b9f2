# SPDX-License-Identifier: Apache-2.0
"""Identity of the run whose checkpoints are in a folder.

One small file beside them keeps other runs from continuing their weights.

What a resumed run takes from the checkpoint, whatever its configuration says, is compared as well:
Megatron's scheduler with ``use_checkpoint_opt_param_scheduler`` (``_check_and_set`` in
``megatron/core/optimizer_param_scheduler.py``), and with FSDP the learning rate (``base_lrs`` in
the state of torch's ``LambdaLR``).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from capo_verl.config import verl_knobs
from capo_verl.plugin.checks.files import sees_files
from capo_verl.plugin.checks.resume import checkpoint_folder
from capo_verl.plugin.checks.run_spec import ACTOR, MODEL, ROLLOUT
from capo_verl.utils import TRACKER, replace_text

logger = logging.getLogger(__name__)

FILE = "run.json"
OPTIM = f"{ACTOR}.optim"
RESTART = f"{OPTIM}.use_checkpoint_opt_param_scheduler"
CAPO = "capo"
STEPS = "trainer.total_training_steps"
EPOCHS = "trainer.total_epochs"
RATE = f"{OPTIM}.lr"

EXPERIMENT = (f"{MODEL}.path", CAPO, f"{ACTOR}.policy_loss.loss_mode")
"""Keys with another value of which a run is another experiment."""
SCHEDULE = tuple(
    f"{OPTIM}.{key}"
    for key in (
        "lr", "min_lr", "lr_decay_style", "lr_scheduler_type", "lr_warmup_steps",
        "lr_warmup_steps_ratio", "lr_decay_steps", "weight_decay",
    )
)  # fmt: skip
DIAGNOSTICS = ("sample_tokens", "batch_shift")
"""Knobs of CAPO beginning like these change nothing but what is reported."""
RETIRED = re.compile(r"'(reuse_next_forward|predictor)': [^,}]*, ")
"""Knobs in the records of release 0.1 that later releases do not have."""
LENGTH = (STEPS, EPOCHS)
BATCH = ("data.train_batch_size", f"{ROLLOUT}.n")


def identity(config: DictConfig) -> dict[str, Any]:
    """Keys of verl's configuration that tell one run from another, with their values.

    ``capo`` is ``off``, or the preset and what differs from it.
    """
    found = {
        key: OmegaConf.select(config, key) for key in (*EXPERIMENT, *SCHEDULE, *LENGTH, *BATCH)
    }
    found[CAPO] = _method(config)
    if found[STEPS] is not None:
        found[EPOCHS] = None  # the number of steps wins
    return found


def _method(config: DictConfig) -> str:
    block = OmegaConf.select(config, f"{ACTOR}.policy_loss.capo")
    if block is None:
        return "off"
    knobs = cast("dict[str, Any]", OmegaConf.to_container(block, resolve=True))
    preset = knobs.pop("preset", None)
    usual = verl_knobs(preset) if preset else {}
    own = (
        f"{key}={value}"
        for key, value in knobs.items()
        if not key.startswith(DIAGNOSTICS) and value != usual.get(key)
    )
    return ", ".join([str(preset), *own])


def check_identity(config: DictConfig) -> None:
    """Look at the checkpoint that a run would resume from by itself; nothing is written.

    Raises:
        ValueError: if another run wrote it, or if this one's learning rate or schedule would have
            no effect.
    """
    folder = _folder(config)
    if (
        folder is None
        or OmegaConf.select(config, "trainer.resume_mode") != "auto"
        or not (folder / TRACKER).exists()
    ):
        return
    then = _read(folder / FILE)
    if then is None:  # written before there was this file
        return
    now = identity(config)
    for key in _changed(EXPERIMENT, then, now):
        raise ValueError(
            f"{folder} holds checkpoints of another run: {key} was {then[key]}, is {now[key]}: set "
            f"another OUTPUT_DIR (or delete {folder / FILE} if that is only another name for the "
            "same)"
        )
    for key in _without_effect(config, then, now):
        raise ValueError(
            f"{key} was {then[key]} when the checkpoints in {folder} were written, is {now[key]}, "
            "and would have no effect, since the schedule is taken from there: set another "
            "OUTPUT_DIR"
            + (f", or {RESTART}=False to start the schedule anew" if _is_megatron(config) else "")
        )
    for key in _changed(BATCH, then, now):
        logger.warning(
            "%s was %s when the checkpoints in %s were written, is %s",
            key,
            then[key],
            folder,
            now[key],
        )


def record_identity(config: DictConfig) -> None:
    """Remember what run writes its checkpoints here, if it writes any.

    Raises:
        OSError: if the folder cannot be written to.
    """
    folder = _folder(config)
    if folder is not None and (OmegaConf.select(config, "trainer.save_freq") or -1) > 0:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / FILE, json.dumps(identity(config), indent=2) + "\n")


def _folder(config: DictConfig) -> Path | None:
    return checkpoint_folder(config) if sees_files() else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not what a run writes there ({e}): delete it") from e
    if isinstance(found, dict) and isinstance(found.get(CAPO), str):
        found[CAPO] = RETIRED.sub("", found[CAPO])
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not what a run writes there: delete it")
    return found


def _changed(
    keys: tuple[str, ...], then: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    """Keys among ``keys`` whose values differ; one that was not remembered says nothing."""
    return (key for key in keys if key in then and then[key] != now[key])


def _without_effect(
    config: DictConfig, then: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    if not _is_megatron(config):
        yield from _changed((RATE,), then, now)
    elif OmegaConf.select(config, RESTART):
        yield from _changed(SCHEDULE, then, now)
        # How long the run is changes a constant rate in nothing, nor one whose decay has a length
        # of its own.
        if now[f"{OPTIM}.lr_decay_style"] != "constant" and now[f"{OPTIM}.lr_decay_steps"] is None:
            yield from _changed(LENGTH, then, now)


def _is_megatron(config: DictConfig) -> bool:
    return bool(OmegaConf.select(config, f"{ACTOR}.strategy") == "megatron")
