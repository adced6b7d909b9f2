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
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from capo_verl.plugin.checks.model_shape import local_config
from capo_verl.plugin.checks.run_spec import MODEL

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def sees_files() -> bool:
    """True if this process may judge the workers' files by its own."""
    return os.environ.get("CAPO_PREFLIGHT") != "0" and not os.environ.get(
        "RAY_ADDRESS", ""
    ).startswith("ray://")


def check_files(config: DictConfig) -> None:
    """Check the model, the data files and the output directory of a run.

    Raises:
        ValueError: for a model, data file or output directory that cannot be used.
    """
    if not sees_files():
        return
    for problem in [
        *model_problems(config),
        *cache_problems(config),
        *data_problems(config),
        *output_problems(config),
    ]:
        raise ValueError(problem)


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


def data_problems(config: DictConfig) -> Iterator[str]:
    """Files that verl's own dataset could not read."""
    if OmegaConf.select(config, "data.custom_cls.path") is not None:
        return
    column = OmegaConf.select(config, "data.prompt_key") or "prompt"
    for key in ("train_files", "val_files"):
        files = OmegaConf.select(config, f"data.{key}")
        rows: list[int | None] = []
        for file in files if isinstance(files, list | ListConfig) else [files]:
            problem, count = _data_file(f"data.{key}={file}", str(file), column)
            if problem:
                yield problem
            rows.append(count)
        if key == "train_files" and None not in rows:
            yield from _too_few(config, sum(row for row in rows if row is not None))


def _data_file(what: str, name: str, column: str) -> tuple[str | None, int | None]:
    """Problem of one data file, and its number of rows.

    Either is None if there is none, or it cannot be told.
    """
    path = Path(name).expanduser()
    if "://" in name or any(c in name for c in "*?[") or path.is_dir():
        return None, None
    if not path.exists():
        return f"{what} does not exist: set it to a parquet file in verl's schema", None
    if path.suffix not in (".parquet", ".json", ".jsonl"):  # verl/utils/dataset/rl_dataset.py
        return (
            f"{what} is neither .parquet, .json nor .jsonl: set it to a parquet file in verl's "
            "schema",
            None,
        )
    if path.suffix != ".parquet":
        return None, None
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as e:
        return f"{what} cannot be read ({e}): set it to a parquet file in verl's schema", None
    names = metadata.schema.to_arrow_schema().names
    if column not in names:
        return (
            f"{what} lacks the column '{column}' (it has {', '.join(names)}): prepare it anew, or "
            "set data.prompt_key",
            None,
        )
    return None, metadata.num_rows


def _too_few(config: DictConfig, rows: int) -> Iterator[str]:
    """Problem of a data set that is smaller than a batch.

    verl leaves out an incomplete batch, and divides by their number (``trainer_base.py:765``).
    """
    batch = OmegaConf.select(config, "data.train_batch_size")
    limit: Any = OmegaConf.select(config, "data.train_max_samples") or -1
    used = rows if limit < 0 else min(rows, limit)
    if used < batch:
        yield (
            f"data.train_files have {used} prompts, less than one data.train_batch_size={batch}: "
            "lower it, or give more"
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
