# SPDX-License-Identifier: Apache-2.0
"""Many cases in one launch: starting processes and importing verl takes longer than most cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks


def in_turn(fn: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
    """On a rank: ``fn(*call)`` for every call, in the same process.

    Megatron's groups are made anew for each.
    """
    from megatron.core import parallel_state as mpu

    results = []
    for call in calls:
        results.append(fn(*call))
        mpu.destroy_model_parallel()
    return results


def launch_by_size(
    request: pytest.FixtureRequest,
    fn: Callable[..., Any],
    call_of: Callable[[Any], tuple],
    timeout: float = 600.0,
) -> Callable[[Any], list[Any]]:
    """What ``fn(*call_of(case))`` returns on every rank of ``case.layout``.

    When a case is first asked for, all cases of its number of ranks run: those with which pytest
    will call the tests of the requesting module, as their parameter ``case``.
    """
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if getattr(item, "module", None) is request.module
        and "case" in getattr(item, "callspec", _NONE).params
        and item.get_closest_marker("skip") is None
    ]
    done: dict[Any, list[Any]] = {}

    def get(case: Any) -> list[Any]:
        if case not in done:
            size = case.layout.world_size
            group = [c for c in dict.fromkeys(chosen) if c.layout.world_size == size]
            calls = [call_of(c) for c in group]
            ranks = run_on_ranks(in_turn, size, fn, calls, preload=ENGINE_MODULES, timeout=timeout)
            done.update(zip(group, map(list, zip(*ranks, strict=True)), strict=True))
        return done[case]

    return get


class _NONE:
    params: dict[str, Any] = {}
