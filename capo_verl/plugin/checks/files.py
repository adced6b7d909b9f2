# SPDX-License-Identifier: Apache-2.0
"""Files of a run that would stop it minutes later.

Only what is certain to fail is refused: names on the hub, remote paths, custom datasets and
whatever else cannot be judged from here pass. The driver may see other files than the workers do;
``CAPO_PREFLIGHT=0`` switches the checks of files off.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.checks.data import read_data
from capo_verl.plugin.checks.model_shape import local_config
from capo_verl.plugin.checks.run_spec import MODEL

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def sees_files() -> bool:
    """True if this process may judge the workers' files by its own."""
    return os.environ.get("CAPO_PREFLIGHT") != "0" and not os.environ.get(
        "RAY_ADDRESS", ""
    ).startswith("ray://")


def check_files(config: DictConfig) -> list[str]:
    """Check the model, the data files and the output directory of a run.

    Returns:
        Notes: how many rows of the data were read.

    Raises:
        ValueError: for a model, data file or output directory that cannot be used.
    """
    if not sees_files():
        return []
    data, notes = read_data(config)
    for problem in [
        *model_problems(config),
        *cache_problems(config),
        *data,
        *output_problems(config),
    ]:
        raise ValueError(problem)
    return notes


def model_problems(config: DictConfig) -> Iterator[str]:
    """A model path that is none."""
    for key in ("path", "hf_config_path"):
        model = OmegaConf.select(config, f"{MODEL}.{key}")
        if model is None or "://" in model:
            continue
        is_path = model.startswith(("/", "./", "../", "~")) or not HUB_NAME.fullmatch(model)
        folder = Path(model).expanduser()
        what = f"{MODEL}.{key}={model}"
        if key == "path" and OmegaConf.select(config, f"{MODEL}.hf_config_path") is not None:
            continue  # then config.json is taken from there
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                yield (
                    f"{what} has no config.json: set it to a model's folder, or to its name on the "
                    "hub"
                )
        elif is_path:
            yield f"{what} does not exist: set it to a model's folder, or to its name on the hub"


def cache_problems(config: DictConfig) -> Iterator[str]:
    """A name on the hub that was never downloaded, while the hub may not be asked."""
    model = OmegaConf.select(config, f"{MODEL}.path")
    offline = [
        name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    if (
        model
        and offline
        and HUB_NAME.fullmatch(model)
        and not Path(model).exists()
        and local_config(model) is None
    ):
        yield (
            f"{MODEL}.path={model} is neither a folder nor in Hugging Face's cache, and "
            f"{offline[0]} is set: download it first, or unset {offline[0]}"
        )


def output_problems(config: DictConfig) -> Iterator[str]:
    """Checkpoints that could not be written, and one to resume from that is not there."""
    trainer = config.trainer
    if trainer.save_freq and trainer.save_freq > 0:
        folder = Path(trainer.default_local_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            yield (
                f"trainer.default_local_dir={folder} cannot be written to ({e.strerror}): set it "
                "to a folder of yours"
            )
    if trainer.resume_mode == "resume_path":
        path = trainer.resume_from_path
        if not isinstance(path, str) or "global_step_" not in path or not Path(path).is_dir():
            yield (
                f"trainer.resume_from_path={path}: set it to the folder global_step_N of a "
                "checkpoint"
            )
