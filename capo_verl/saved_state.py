# SPDX-License-Identifier: Apache-2.0
"""What every engine's checkpoint of CAPO's moments has in common: when it is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

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
        raise ValueError("its checksum does not fit: the files were damaged after they were written")


def unusable(path: Path, problem: str) -> RuntimeError:
    """The error to raise on every rank. ``path`` lies in the checkpoint's folder ``capo``."""
    return RuntimeError(
        f"the CAPO state in {path} cannot be used ({problem}); resume from another checkpoint, or remove the directory "
        f"{path.parent} to start with empty moments"
    )
