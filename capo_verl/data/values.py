# SPDX-License-Identifier: Apache-2.0
"""Values of a data set's cells as text: what their author would have written, or an error.

``str`` makes a word of everything: of None, of a list, of 1e22.
"""

from __future__ import annotations

import numbers
import re
from decimal import Decimal
from typing import Any

SCHEMA_TEXT = re.compile(r"\s*(\[\s*)?\{\s*(['\"])(role|content|style|ground_truth)\2\s*:")
"""Beginning of a text that was a chat list or a ``reward_model``, as JSON or as Python."""

MAX_DIGITS = 1000


def plain(value: Any) -> Any:
    """A Python value for a scalar or an array of numpy or pyarrow; others as they are."""
    if hasattr(value, "as_py"):
        return value.as_py()
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        if getattr(value, "ndim", 0):
            return list(value)
        kind = getattr(value.dtype, "kind", "")
        if kind == "f":  # a float32 has a shorter text than the float64 of the same value
            return float(str(value[()]))
        if kind in tuple("biuOSU"):  # of a datetime64, item() is a number
            return value.item()
    return value


def is_empty(value: Any) -> bool:
    """True for None, NaN and blank text: what stands for an empty cell."""
    value = plain(value)
    if isinstance(value, (float, Decimal)):
        return Decimal(value).is_nan()
    return value is None or (isinstance(value, str) and not value.strip())


def is_text(value: Any) -> bool:
    """True for a string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def text_of(value: Any, place: str) -> str:
    """The text of a string or a number, without spaces around it.

    27.0 is ``27``, 1e22 is ``10000000000000000000000``, -0.0 is ``0``.

    Args:
        place: file, record and column, for errors.

    Raises:
        ValueError: for an empty value, and for anything else.
    """
    value = plain(value)
    if is_empty(value):
        raise ValueError(f"{place}: it is empty")
    if isinstance(value, str):
        if SCHEMA_TEXT.match(value):
            raise ValueError(
                f"{place}: {short(value)} is the text of a list or an object: give the list or the "
                "object itself (.jsonl or .parquet)"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {short(value)} is no valid text: {error.reason}") from error
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, float, Decimal)):
        raise ValueError(
            f"{place}: {short(value)} is of type {type(value).__name__}, neither text nor a number"
        )
    number = Decimal(int(value)) if isinstance(value, numbers.Integral) else Decimal(str(value))
    if not number.is_finite():
        raise ValueError(f"{place}: {value} is not finite")
    if abs(number.adjusted()) > MAX_DIGITS:
        raise ValueError(f"{place}: the number has more than {MAX_DIGITS} digits: write it as text")
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def short(value: Any) -> str:
    """A value as an error shows it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
