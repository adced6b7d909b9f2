# SPDX-License-Identifier: Apache-2.0
"""The folder with the Hugging Face weights of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from capo_verl.utils import TRACKER

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Under global_step_N: verl's FSDP layout, its Megatron layout, and that of versions before 0.9.
INSIDE = ("actor/huggingface", "actor/model/huggingface", "huggingface", "model/huggingface")


def find_model(path: str) -> str:
    """The folder with the weights of a model or a checkpoint.

    ``path`` is a Hugging Face folder, ``global_step_N``, or a run's folder (its latest step).

    A name like ``Qwen/Qwen2.5-Math-7B`` that is no folder here is taken as one of the hub's.

    Raises:
        ValueError: saying how to save or merge weights, if there are none.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return path
        raise ValueError(f"--model {path}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"--model {path}: a folder is expected")
    if (folder / TRACKER).exists():
        folder = folder / f"global_step_{(folder / TRACKER).read_text().strip()}"
    for candidate in (folder, *(folder / inside for inside in INSIDE)):
        if (candidate / "config.json").exists() and any(
            next(candidate.glob(pattern), None) for pattern in WEIGHTS
        ):
            return str(candidate)
    actor = next(
        (p for p in (folder / "actor", folder) if p.is_dir() and _is_verl_checkpoint(p)), None
    )
    if actor is None:
        raise ValueError(
            f"--model {path}: neither config.json with *.safetensors nor a checkpoint of verl is "
            "there"
        )
    backend = "fsdp" if next(actor.glob("model_world_size_*"), None) else "megatron"
    raise ValueError(
        f"--model {path}: this checkpoint has no Hugging Face weights. Save them while training, "
        "by actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model], or "
        f"merge them now: python -m verl.model_merger merge --backend {backend} --local_dir "
        f"{actor} --target_dir {actor / 'huggingface'}"
    )


def _is_verl_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dist_ckpt", "model", "huggingface")) or any(
        next(folder.glob(pattern), None) for pattern in ("model_world_size_*", "extra_state_*")
    )
