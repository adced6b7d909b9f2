# SPDX-License-Identifier: Apache-2.0
"""The tiny tier's tasks, one file each. :func:`make_task` builds one from its name and knobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from capo_verl.experiments.study.tasks.base import Problems, Task


def _sort8(**knobs: Any) -> Task:
    from capo_verl.experiments.study.tasks.sorting import Sorting

    return Sorting(**knobs)


def _sums(**knobs: Any) -> Task:
    from capo_verl.experiments.study.tasks.sums import Sums

    return Sums(**knobs)


def _gym(**knobs: Any) -> Task:
    from capo_verl.experiments.study.tasks.gym import Palindromes

    return Palindromes(**knobs)


def _long(**knobs: Any) -> Task:
    from capo_verl.experiments.study.tasks.long import InsertionSort

    return InsertionSort(**knobs)


def _fillers(**knobs: Any) -> Task:
    from capo_verl.experiments.study.tasks.fillers import Fillers

    return Fillers(**knobs)


TASKS: dict[str, Callable[..., Task]] = {
    "sort8": _sort8,
    "sums": _sums,
    "gym": _gym,
    "long": _long,
    "fillers": _fillers,
}


def make_task(name: str, knobs: Mapping[str, Any] | None = None) -> Task:
    """The task ``name``.

    Raises:
        ValueError: for an unknown task or knob.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {', '.join(TASKS)}")
    try:
        return TASKS[name](**(knobs or {}))
    except TypeError as e:
        raise ValueError(f"task_knobs={dict(knobs or {})!r} of task {name}: {e}") from None


__all__ = ["TASKS", "Problems", "Task", "make_task"]
