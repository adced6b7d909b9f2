# SPDX-License-Identifier: Apache-2.0
"""The few numbers a resumed run needs beside the moments: ``<checkpoint>/capo/control.json``.

The scale of the learning rate, an adaptive threshold, a guard's count: plain floats, the same for
every layout, written by the first rank and read for all. A file that was damaged is refused, not
guessed at.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from capo_verl.utils import replace_text

VERSION = 1


class Control(NamedTuple):
    """The contents of the file."""

    moments: bool
    """True if moments were saved beside it."""
    kl_budget: dict[str, float] | None
    """``KLBudget.state_dict()``; None in a run without."""
    filter: dict[str, float]
    """``CapoFilter.adaptive_state()``; empty if nothing in it adapts."""


def path_of(checkpoint: str) -> Path:
    return Path(checkpoint, "capo", "control.json")


def gather(
    moments: bool, kl_budget: dict[str, float] | None, filter_state: dict[str, float]
) -> Control | None:
    """Collect the contents to save, on every rank; None if there are none. Collective.

    Args:
        filter_state: of this rank's filter, empty if it has none: the first rank need not hold the
            LM head.
    """
    states: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, filter_state)
    adaptive = next((state for state in states if state), {})
    if kl_budget is None and not adaptive and moments:
        return None  # as before there was anything but moments
    return Control(moments, kl_budget, adaptive)


def save(checkpoint: str, control: Control) -> None:
    """Write the file, whole or not at all. Collective over all ranks."""
    if dist.get_rank() == 0:
        path = path_of(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        payload = control._asdict()
        text = json.dumps({"version": VERSION, **payload, "sha256": _sum(payload)}, indent=1)
        replace_text(path, text + "\n")
    dist.barrier()


def load(checkpoint: str) -> Control | None:
    """Read the file. Collective over all ranks.

    Returns:
        None if the checkpoint holds none.

    Raises:
        RuntimeError: on every rank, if it cannot be read or was damaged.
    """
    path = path_of(checkpoint)
    control, problem = None, ""
    if dist.get_rank() == 0 and path.exists():
        try:
            control = _read(path)
        except (
            Exception
        ) as e:  # whatever the reason: all ranks have to learn of it before any of them stops
            problem = f"{type(e).__name__}: {e}"
    found: list[Any] = [control, problem]
    dist.broadcast_object_list(found, src=0)
    control, problem = found
    if problem:
        raise unusable(path, problem)
    return control


def has_no_moments(checkpoint: str) -> bool:
    """True if a checkpoint says that it was written without moments.

    Asked of a file that :func:`load` has accepted.
    """
    path = path_of(checkpoint)
    return path.exists() and not _read(path).moments


def _read(path: Path) -> Control:
    payload = json.loads(path.read_text())
    if payload.pop("version") != VERSION:
        raise ValueError(f"it is of another version than {VERSION}")
    if payload.pop("sha256") != _sum(payload):
        raise ValueError("its checksum does not fit: the file was damaged after it was written")
    return Control(**payload)


def _sum(payload: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors of ``CapoFilter.state_dict()``."""


def check_model(saved: tuple[int, int], model: tuple[int, int]) -> None:
    """Vocabulary and hidden size of the saved moments against the model's.

    Raises:
        ValueError: if they differ.
    """
    if saved != model:
        raise ValueError(
            f"it was saved for a vocabulary of {saved[0]} and hidden size {saved[1]}, "
            f"this model has {model[0]} and {model[1]}"
        )


def check_undamaged(unchanged: bool) -> None:
    """
    Raises:
        ValueError: if the checksum is another one than that of what was written.
    """
    if not unchanged:
        raise ValueError(
            "its checksum does not fit: the files were damaged after they were written"
        )


def unusable(path: Path, problem: str) -> RuntimeError:
    """The error to raise on every rank. ``path`` lies in the checkpoint's folder ``capo``."""
    return RuntimeError(
        f"the CAPO state in {path} cannot be used ({problem}); resume from another checkpoint, or "
        f"remove the directory {path.parent} to start with empty moments"
    )
