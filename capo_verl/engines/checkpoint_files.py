# SPDX-License-Identifier: Apache-2.0
"""The few numbers a resumed run needs beside the moments: ``<checkpoint>/capo/control.json``.

The scale of the learning rate, an adaptive threshold, a guard's count: plain floats, the same for
every layout, written by the first rank and read for all. A file that was damaged is refused, not
guessed at.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from capo_verl.utils import replace_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

VERSION = 1


class Control(NamedTuple):
    """The contents of the file."""

    moments: bool
    """True if moments were saved beside it."""
    kl_budget: dict[str, float | None] | None
    """``KLBudget.state_dict()``; None in a run without."""
    filter: dict[str, float]
    """``CapoFilter.adaptive_state()``; empty if nothing in it adapts."""


def path_of(checkpoint: str) -> Path:
    return Path(checkpoint, "capo", "control.json")


def gather(
    moments: bool, kl_budget: dict[str, float | None] | None, filter_state: dict[str, float]
) -> Control | None:
    """Collect the contents to save, on every rank; None if there are none. Collective.

    Args:
        filter_state: of this rank's filter, empty if it has none: the first rank need not hold the
            LM head.
    """
    adaptive = next((state for state in gathered(filter_state) if state), {})
    if kl_budget is None and not adaptive and moments:
        return None  # as before there was anything but moments
    return Control(moments, kl_budget, adaptive)


def save(checkpoint: str, control: Control) -> None:
    """Write the file, whole or not at all. Collective over all ranks.

    Raises:
        RuntimeError: on every rank, if it cannot be written.
    """
    path = path_of(checkpoint)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, contents_of(control))

    together(write if dist.get_rank() == 0 else None, path, not_saved)


def load(checkpoint: str) -> Control | None:
    """Read the file. Collective over all ranks.

    Returns:
        None if the checkpoint holds none.

    Raises:
        RuntimeError: on every rank, if it cannot be read or was damaged.
    """
    path = path_of(checkpoint)

    def read() -> Control | None:
        return _read(path) if path.exists() else None

    return gathered(together(read if dist.get_rank() == 0 else None, path, unusable))[0]


def contents_of(control: Control) -> str:
    """The text of the file."""
    payload = control._asdict()
    return json.dumps({"version": VERSION, **payload, "sha256": _sum(payload)}, indent=1) + "\n"


def has_no_moments(checkpoint: str) -> bool:
    """True if a checkpoint says that it was written without moments.

    Asked of a file that :func:`load` has accepted.
    """
    path = path_of(checkpoint)
    return path.exists() and not _read(path).moments


def _read(path: Path) -> Control:
    payload = json.loads(path.read_text(encoding="utf-8"))
    expected = {"version", "sha256", *Control._fields}
    if not isinstance(payload, dict) or payload.keys() - expected:
        raise ValueError(f"it holds something else than {', '.join(sorted(expected))}")
    if expected - payload.keys():
        raise KeyError(f"missing: {', '.join(sorted(expected - payload.keys()))}")
    if payload.pop("version") != VERSION:
        raise ValueError(f"it is of another version than {VERSION}")
    if payload.pop("sha256") != _sum(payload):
        raise ValueError("its checksum does not fit: the file was damaged after it was written")
    control = Control(**payload)
    if (
        not isinstance(control.moments, bool)
        or not isinstance(control.kl_budget, dict | None)
        or not isinstance(control.filter, dict)
    ):
        raise ValueError("moments is not true or false, or kl_budget or filter no table of numbers")
    return control


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


class Header(NamedTuple):
    """Header of a state of moments: all that it says beside their values."""

    step: int
    vocab_size: int
    hidden_size: int


def sealed(checksums: Sequence[int], header: Header) -> list[int]:
    """Checksums of ``MOMENTS`` with the header in them: int64 each, modulo 2^64."""
    return [
        (total + _hash(f"{name} {header.step} {header.vocab_size} {header.hidden_size}") + _SIGN)
        % (2 * _SIGN)
        - _SIGN
        for name, total in zip(MOMENTS, checksums, strict=True)
    ]


_SIGN = 1 << 63


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def check_undamaged(
    saved: Sequence[int], checksums: Sequence[int], header: Header, path: Path
) -> None:
    """Compare what was written beside the moments with what was read.

    Args:
        saved: what :func:`sealed` returned then, or the bare ``checksums`` of release 0.1, which
            gets a warning.
        checksums: of the moments as they were read.

    Raises:
        ValueError: if they differ.
    """
    if list(saved) == sealed(checksums, header):
        return
    if list(saved) != list(checksums):
        raise ValueError(
            "its checksum does not fit: the files were damaged after they were written"
        )
    logger.warning(
        "the CAPO state in %s is of release 0.1: no checksum covers its number of updates, %d",
        path, header.step,
    )  # fmt: skip


def unusable(path: Path, problem: str) -> RuntimeError:
    """The error to raise on every rank. ``path`` lies in the checkpoint's folder ``capo``."""
    return RuntimeError(
        f"the CAPO state in {path} cannot be used ({problem}); resume from another checkpoint, or "
        f"remove the directory {path.parent} to start with empty moments"
    )


def not_saved(path: Path, problem: str) -> RuntimeError:
    """The error to raise on every rank. ``path`` as for :func:`unusable`."""
    return RuntimeError(
        f"the checkpoint {path.parent.parent} was not saved: {path} cannot be written ({problem}); "
        "free disk space or change the folder's permissions, then resume from the one before"
    )


def together(
    work: Callable[[], T] | None, path: Path, error: Callable[[Path, str], RuntimeError]
) -> T | None:
    """Do this rank's work; if it fails on any rank, fail on all. Collective over all ranks.

    Args:
        work: None on ranks that have none. A collective in it has to fail on all of its ranks.
        path: what is read or written.
        error: :func:`unusable` or :func:`not_saved`.

    Raises:
        RuntimeError: on every rank, of the first one whose work raised.
    """
    result, problem = None, ""
    try:
        result = None if work is None else work()
    except (Exception, CheckpointException) as e:
        # Whatever the reason: all have to learn of it before any of them stops.
        problem = _reason(e)
    problems = [problem for problem in gathered(problem) if problem]
    if problems:
        raise error(path, problems[0])
    return result


def gathered(x: T) -> list[T]:
    """``x`` of every rank, in rank order. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def _reason(e: BaseException) -> str:
    """The reason on one line."""
    if isinstance(e, CheckpointException) and e.failures:  # each rank's, with its traceback
        e = next(iter(e.failures.values()))[0]
    text = " ".join(str(e).split())
    if "weights_only" in text:
        # torch goes on to advise loading it without that, which would run what is in it.
        text = "a file is damaged, or holds more than tensors"
    return f"{type(e).__name__}: {text}"
