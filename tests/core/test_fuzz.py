# SPDX-License-Identifier: Apache-2.0
"""Random input and state: a call that raises has changed nothing, what is taken leaves finite
state, and what loads equals what was saved.

``make fuzz`` tries many more examples.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capo_verl import CapoConfig, CapoFilter
from capo_verl.config import KLBudgetConfig
from capo_verl.core.checksum import checksum
from capo_verl.core.kl_budget import KLBudget, is_scale
from tests.core.test_refusals import KNOBS, SHAPE, H, V, arguments, make, trained
from tests.helpers.unchanged import contents

EXTREME = (
    0.0, -0.0, 1e-300, 1e-45, 1e-20, 1.0, -1.0, 1e4, -1e10, 1e18, 1e19, -1e20, 1e30, 3e38, 1e39,
    -1e300, math.inf, -math.inf, math.nan,
)  # fmt: skip
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ODD = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.bool, torch.complex64)
TENSORS = ("hidden_states", "logits", "actions", "advantages", "response_mask", "temperature")

extreme = st.sampled_from(EXTREME)
numbers = st.one_of(
    extreme, st.floats(), st.integers(), st.just(10**400), st.none(), st.text(),
    st.booleans(),
)  # fmt: skip
anything = st.one_of(numbers, st.lists(numbers, max_size=2), st.just(torch.tensor(1.0)))


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``evaluate``, of which some are not what they should be."""
    kw = arguments(draw(st.sampled_from(FLOATS[:2])), seed=draw(st.integers(0, 3)))
    kw["temperature"] = torch.ones(SHAPE)
    kw["response_mask"] = torch.tensor(draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    kw["response_mask"] = kw["response_mask"].view(SHAPE)
    kw |= {"skip_masked": draw(st.booleans())}
    for name in draw(st.lists(st.sampled_from(TENSORS), max_size=2)):
        kw[name] = kw[name].to(draw(st.sampled_from((*FLOATS, *ODD))))
    for name in draw(st.lists(st.sampled_from(TENSORS), max_size=3)):
        if kw[name].dtype in FLOATS:
            at = draw(st.integers(0, kw[name].numel() - 1))
            kw[name].view(-1)[at] = torch.tensor(draw(extreme), dtype=torch.float64)
        elif kw[name].dtype == torch.int64:
            kw[name].view(-1)[draw(st.integers(0, 5))] = draw(
                st.integers(-(1 << 63), (1 << 63) - 1)
            )
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(TENSORS))
        kw[name] = draw(st.sampled_from((kw[name][:1], kw[name][:0], kw[name][0], kw[name].mT)))
    if draw(st.integers(0, 3)) == 0:
        kw["learning_rate"] = draw(anything)
    if draw(st.integers(0, 3)) == 0:
        kw["max_tokens"] = draw(anything)
    if draw(st.integers(0, 3)) == 0:
        kw["num_sequences"] = draw(st.one_of(st.integers(-1, 3), numbers))
        kw["sequence_ids"] = torch.tensor(
            draw(st.lists(st.integers(-1, 3), min_size=6, max_size=6))
        ).view(SHAPE)
    return kw


def same(a: Any, b: Any) -> bool:
    return bool(repr(contents(a)) == repr(contents(b)))


@pytest.mark.parametrize("knobs", KNOBS)
@given(kw=inputs())
def test_fuzz_inputs(knobs: str, kw: dict[str, Any]) -> None:
    capo = trained(knobs)
    before = contents(capo)
    try:
        out = capo.evaluate(**kw)
    except ValueError as e:
        assert "\n" not in str(e) and 0 < len(str(e)) < 700
        assert contents(capo) == before
        return
    mask = kw["response_mask"].bool()
    for x in (out.policy_shift, out.objective_shift, out.weights):
        assert x[mask].isfinite().all()
    capo.step()
    state, adaptive = capo.state_dict(), capo.adaptive_state()
    again = make(knobs)
    again.load_state_dict(state)
    again.load_adaptive_state(adaptive)
    assert same(again.state_dict(), state) and again.adaptive_state() == adaptive


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """A saved state with a bit, a number, a tensor or a key that is another one."""
    saved = trained()
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in saved.state_dict().items()}  # fmt: skip
    kind = draw(st.sampled_from(["bits", "step", "value", "swap", "dtype", "shape", "keys"]))
    name = draw(st.sampled_from(["exp_avg", "exp_avg_sq"]))
    if kind == "bits":
        data = state[name].view(torch.int32).view(-1)
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 30))
    elif kind == "step":
        state["step"] = draw(anything)
    elif kind == "value":
        state[name] = draw(anything)
    elif kind == "swap":
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]
    elif kind == "dtype":
        state[name] = state[name].to(draw(st.sampled_from((*FLOATS, *ODD))))
    elif kind == "shape":
        state[name] = draw(st.sampled_from((state[name][:-1], state[name].T, state[name][0])))
    else:
        state[draw(st.text())] = state.pop(name)
    return state


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@given(state=states())
def test_fuzz_state_of_a_filter(moments: str, state: dict[str, Any]) -> None:
    capo = trained("adaptive", moments_dtype=moments)
    before = contents(capo)
    try:
        capo.load_state_dict(state)
    except ValueError as e:
        assert str(e).startswith("CAPO state") and "\n" not in str(e)
        assert contents(capo) == before
        return
    loaded = capo.state_dict()
    assert loaded["step"] == state["step"]
    for name in ("exp_avg", "exp_avg_sq"):
        assert loaded[name].isfinite().all()
        assert torch.equal(loaded[name], state[name].to(loaded[name].dtype))


NAMES = (
    "policy_threshold", "threshold_quantile", "threshold_correction", "threshold_steps",
    "filter_stopped", "rejection_streak", "balance_positive", "scale",
    "calibration", "curvature", "measured", "floor", "rate",
)  # fmt: skip
tables = st.one_of(
    anything,
    st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(), st.integers()), anything),
)


@given(state=tables)
def test_fuzz_adaptive_state(state: Any) -> None:
    capo = trained("adaptive")
    before = contents(capo)
    try:
        capo.load_adaptive_state(state)
    except ValueError as e:
        assert str(e).startswith("CAPO adaptive state: ")
        assert contents(capo) == before
        return
    loaded = capo.adaptive_state()
    assert {name: loaded[name] for name in state if name in loaded} == {
        name: value for name, value in state.items() if name in loaded
    }


def begun() -> KLBudget:
    """After a measurement, in the middle of a step."""
    budget = KLBudget(KLBudgetConfig(delta=1e-4))
    for kl in (1e-9, 1e-7):
        budget.begin_step(1e-3, 1e-3)
        budget.end_step(kl)
    budget.begin_step(1e-3, 1e-3)
    return budget


@given(state=tables)
def test_fuzz_state_of_a_budget(state: Any) -> None:
    budget = begun()
    before = contents(budget)
    try:
        budget.load_state_dict(state)
    except ValueError as e:
        assert str(e).startswith("kl_budget state: ")
        assert contents(budget) == before
        return
    assert is_scale(state) or budget.state_dict() == state
    assert budget.begin_step(1e-3, 1e-3) > 0


@given(kl=anything)
def test_fuzz_measurements_of_a_budget(kl: Any) -> None:
    budget = begun()
    before = contents(budget)
    try:
        budget.end_step(kl)
    except ValueError:
        assert contents(budget) == before
        return
    assert 0 <= budget.curvature < math.inf


@given(betas=st.one_of(anything, st.tuples(anything, anything)), eps=anything)
def test_fuzz_optimizer(betas: Any, eps: Any) -> None:
    capo = trained()
    before = contents(capo)
    try:
        capo.set_optimizer(betas, eps)
    except ValueError:
        assert contents(capo) == before
        return
    assert all(0 <= beta < 1 for beta in capo.model.betas) and capo.model.eps >= 0


@given(sizes=st.fixed_dictionaries({"vocab_size": anything, "hidden_size": anything}))
def test_fuzz_sizes(sizes: dict[str, Any]) -> None:
    good = all(type(x) is int and x > 0 for x in sizes.values())
    if good:
        sizes = {name: min(size, 64) for name, size in sizes.items()}
    try:
        CapoFilter(CapoConfig(top_k=1), **sizes)
    except ValueError:
        assert not good
    else:
        assert good


@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, V * H - 1),
    st.integers(0, 63),
)
def test_fuzz_checksum(dtype: torch.dtype, at: int, bit: int) -> None:
    """Every bit of every element counts, and rows may be cut anywhere."""
    x = torch.randn(V, H, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(checksum(x, 0, None))
    parts = sum(int(checksum(part, first, None)) for part, first in ((x[:3], 0), (x[3:], 3)))
    assert struct.pack("<Q", parts % 2**64) == struct.pack("<Q", whole % 2**64)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    bit %= 8 * x.itemsize - 1
    x.view(integers).view(-1)[at] ^= 1 << bit
    assert int(checksum(x, 0, None)) != whole
