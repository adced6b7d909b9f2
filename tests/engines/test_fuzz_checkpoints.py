# SPDX-License-Identifier: Apache-2.0
"""Checkpoints damaged at random: what loads equals what was saved, everything else is refused.

``make fuzz`` tries many more examples.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.damage_cases import damage, damages, fuzz
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("layout", [Layout(), FsdpLayout("fsdp")], ids=["megatron", "fsdp"])
def test_fuzz_moments(layout, tiny_qwen2, tmp_path):
    profile = settings()
    seed = None if profile.derandomize else random.randrange(1 << 32)
    (loaded,) = run_on_ranks(
        fuzz, 1, layout, tiny_qwen2, str(tmp_path), profile.max_examples, seed,
        preload=ENGINE_MODULES, timeout=60 + profile.max_examples,
    )  # fmt: skip
    assert loaded < profile.max_examples


numbers = st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=2)


@given(
    moments=st.booleans(), kl_budget=st.one_of(st.none(), numbers), filter_state=numbers,
    way=damages(),
)  # fmt: skip
def test_fuzz_control(
    tmp_path_factory: Any, moments: bool, kl_budget: Any, filter_state: Any, way: Any
) -> None:
    from capo_verl.engines.checkpoint_files import Control, _read, contents_of

    folder = tmp_path_factory.mktemp("control")
    saved, other = folder / "saved", folder / "other"
    control = Control(moments, kl_budget, filter_state)
    for path, what in ((saved, control), (other, Control(True, {"scale": 0.25}, {}))):
        path.mkdir()
        Path(path, "control.json").write_text(contents_of(what))
    assert _read(saved / "control.json") == control
    kind = "cut" if way[0] == "gone" else way[0]
    damage(saved, other, kind, *way[1:])
    try:
        found = _read(saved / "control.json")
    except (ValueError, KeyError):
        return
    assert found == (_read(other / "control.json") if kind == "swap" else control)
