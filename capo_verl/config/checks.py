# SPDX-License-Identifier: Apache-2.0
"""Checks of single knobs: each raises one sentence with the key, the value found and what is
allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar

Knobs = TypeVar("Knobs")


def build(
    cls: type[Knobs], knobs: Mapping[str, Any], prefix: str, exclude: Sequence[str] = ()
) -> Knobs:
    """A dataclass of knobs from plain data (YAML, Hydra).

    Args:
        prefix: of its keys in error messages, such as ``capo``.
        exclude: fields that are no keys there.

    Raises:
        ValueError: for an unknown key (lists the valid ones), one that is missing and has no
            default, or what the dataclass itself refuses.
    """
    valid = [f.name for f in fields(cls) if f.name not in exclude]  # type: ignore[arg-type]
    for key in knobs:
        if key not in valid:
            close = get_close_matches(str(key), valid, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(
                f"{prefix}.{key} is not a knob of CAPO.{hint} Valid keys: {', '.join(valid)}"
            )
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in knobs:
            raise ValueError(f"{prefix}.{f.name} is missing: it has no default")
    return cls(**knobs)


def is_number(x: Any) -> bool:
    """True for a finite number of Python or NumPy; not for bool, text or a tensor."""
    limit = sys.float_info.max  # an integer may be larger
    return isinstance(x, Real) and not isinstance(x, bool) and bool(abs(x) <= limit)  # type: ignore[operator]


def one_of(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"capo.{key}={value!r}: expected one of {', '.join(allowed)}")


def number(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or not is_number(value):
        raise ValueError(f"capo.{key}={value!r}: expected a finite number")


def integer(key: str, value: Any, minimum: int, none: str | None = None) -> None:
    if value is None and none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        or_null = "" if none is None else f", or null for {none}"
        raise ValueError(f"capo.{key}={value!r}: expected an integer >= {minimum}{or_null}")


def threshold(key: str, value: Any) -> None:
    if value is None:
        return
    number(key, value)
    if value < 0:
        raise ValueError(
            f"capo.{key}={value!r}: a threshold must be >= 0 (0 or null switches the test off)"
        )


def between(key: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    """A finite number in ``low..high``, ``low`` itself excluded with ``low_open``."""
    number(key, value)
    if not (low < value if low_open else low <= value) or value > high:
        raise ValueError(
            f"capo.{key}={value!r}: expected a number in {'(' if low_open else '['}{low:g}, "
            f"{high:g}]"
        )
