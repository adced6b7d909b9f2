# SPDX-License-Identifier: Apache-2.0
"""The folder with the Hugging Face weights of a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from capo_verl.utils import TRACKER

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
INDEX = "model.safetensors.index.json"
TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model", "tekken.json",
)  # fmt: skip
# Under global_step_N: verl's FSDP layout, its Megatron layout, and that of versions before 0.9.
INSIDE = ("actor/huggingface", "actor/model/huggingface", "huggingface", "model/huggingface")


def find_model(path: str) -> str:
    """The folder with the weights of a model or a checkpoint.

    ``path`` is a Hugging Face folder, ``global_step_N``, or a run's folder (its latest step).

    A name like ``Qwen/Qwen2.5-Math-7B`` that is no folder here is taken as one of the hub's.

    Raises:
        ValueError: saying how to save or merge weights, if there are none; naming the file that is
            missing or damaged, if they are not whole.
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
            _refuse_incomplete(path, candidate)
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


def _refuse_incomplete(path: str, folder: Path) -> None:
    """Refuse weights, a configuration or a tokenizer that a loader would stumble over."""
    for name in ("config.json", INDEX):
        if (folder / name).exists():
            _read_json(path, folder / name)
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise ValueError(
            f"--model {path}: {folder} has no tokenizer ({', '.join(TOKENIZERS)}): copy that of "
            "the model the training began with"
        )
    if (folder / INDEX).exists():
        shards = _read_json(path, folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"--model {path}: {folder / INDEX} names no weights: copy it again")
        for shard in sorted({str(shard) for shard in shards.values()}):
            if not (folder / shard).exists():
                raise ValueError(
                    f"--model {path}: {folder / shard} is missing, though {INDEX} names it: copy "
                    "it again"
                )
    for file in sorted(folder.glob("*.safetensors")):
        if damage := _damage(file):
            raise ValueError(f"--model {path}: {file} {damage}: copy or save it again")


def _read_json(path: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--model {path}: {file} is no JSON ({error}): copy or save it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"--model {path}: {file} is no JSON object: copy or save it again")
    return content


def _damage(file: Path) -> str:
    """Damage of a file of safetensors, told by its header; empty if there is none.

    The header is a length of 8 bytes and JSON with each tensor's place behind it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is cut off ({size:,} bytes)"
        try:
            header = json.loads(stream.read(length))
            ends = [
                tensor["data_offsets"][1]
                for name, tensor in header.items()
                if name != "__metadata__"
            ]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "has a damaged header"
    return "" if size == expected else f"has {size:,} bytes, {expected:,} by its header"


def _is_verl_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dist_ckpt", "model", "huggingface")) or any(
        next(folder.glob(pattern), None) for pattern in ("model_world_size_*", "extra_state_*")
    )
