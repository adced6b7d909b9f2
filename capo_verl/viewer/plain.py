# SPDX-License-Identifier: Apache-2.0
"""Foreign configurations as plain values of JSON, within bounds: a small file may describe a huge
one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MOST_VALUES, DEEPEST, LARGEST_FILE = 50_000, 50, 4 << 20
"""Values in a configuration with its aliases written out, levels, and bytes of its file.

verl's has about a thousand values.
"""
EXACT = 2**53
NUMBER = re.compile(r"[-+0-9_:.]{1000,}")
"""Digits that would take long to read: YAML counts ``1:30`` in sixties."""
TOO_MANY = f"more than {MOST_VALUES:,} values, with its aliases written out"
TOO_DEEP = f"nested more than {DEEPEST} levels deep"


def plain(value: Any) -> Any:
    """A copy with nothing but dictionaries, lists, text, numbers, booleans and None in it.

    NaN, infinity and what JSON does not have become text, as do integers that a page would round.

    Raises:
        ValueError: beyond :data:`MOST_VALUES` or :data:`DEEPEST`.
    """
    left = MOST_VALUES

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(TOO_MANY)
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if isinstance(value, Mapping):
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, set | frozenset):
            value = sorted(value, key=str)
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, int):
            if abs(value) <= EXACT:
                return int(value)
            bits = value.bit_length()
            return str(value) if bits < 1000 else f"an integer of {bits} bits"
        return str(value)

    return copy(value, 0)


def read_yaml(text: str) -> Any:
    """A YAML document, with OmegaConf's numbers (``1e-3`` is one); nothing in it is resolved.

    Raises:
        ValueError: beyond the bounds, which are tried before anything is built.
        yaml.YAMLError: if it is none.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    _measure(yaml.parse(text, Loader=base))

    class Loader(base):
        """YAML 1.1 does not read ``1e-3`` as a number; the others are those of the base."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    return yaml.load(text, Loader=Loader)  # noqa: S506  a safe loader


def _measure(events: Any) -> None:
    """Count the values that a document's events describe, each alias as what it stands for."""
    import yaml

    sizes: dict[str, int] = {}
    around: list[tuple[str | None, int]] = []
    for event in events:
        anchor: str | None = None
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, 1))
            if len(around) > DEEPEST:
                raise ValueError(TOO_DEEP)
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} does not stand for what is before it")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            if NUMBER.fullmatch(event.value):
                raise ValueError(f"a number of {len(event.value):,} characters")
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = around.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if around:
            around[-1] = (around[-1][0], around[-1][1] + size)
            if around[-1][1] > MOST_VALUES:
                raise ValueError(TOO_MANY)
