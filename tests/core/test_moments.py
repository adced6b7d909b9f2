# SPDX-License-Identifier: Apache-2.0
"""How the moments are stored: bfloat16 without a bias, sums of touched rows only, on another device and back."""

from __future__ import annotations

import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.checksum import checksum
from capo_verl.core.rounding import round_to_bfloat16
from capo_verl.core.row_sums import RowSums

V, H, LR = 40, 16, 0.02


def feed(capo: CapoFilter, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(seed)
    outs = []
    for _ in range(steps):
        hidden = torch.randn(2, 9, H, generator=generator).to(dtype)
        logits = (2 * torch.randn(2, 9, V, generator=generator)).to(dtype)
        actions = torch.randint(V, (2, 9), generator=generator)
        outs.append(capo.evaluate(hidden, logits, actions, torch.ones(2, 1), torch.ones(2, 9), LR))
        capo.step()
    return outs


def test_rounding_keeps_the_expectation():
    x = torch.tensor([1.0, -1.0, 1.00390625, 3e-39]) * 1.001  # between two bfloat16 each
    repeated = x.expand(20_000, 4).contiguous()
    rounded = round_to_bfloat16(repeated, torch.arange(len(repeated)), step=3, salt=1)
    low, high = (torch.stack([f(rounded[:, i].float()) for i in range(4)]) for f in (torch.min, torch.max))
    assert ((low <= x) & (x <= high) & (low < high)).all()  # both neighbours occur, nothing else
    assert all(len(rounded[:, i].unique()) == 2 for i in range(4))
    spread = (high - low) / 20_000**0.5
    assert ((rounded.float().mean(0) - x).abs() < 4 * spread).all()


def test_rounding_leaves_what_needs_none():
    x = torch.randn(50, 7).bfloat16().float()
    assert torch.equal(round_to_bfloat16(x, torch.arange(50), 1, 0).float(), x)


def test_rounding_does_not_depend_on_the_sharding():
    x, rows = torch.randn(12, 5), torch.arange(12)
    whole = round_to_bfloat16(x, rows, 4, 0)
    parts = torch.cat([round_to_bfloat16(x[at], rows[at], 4, 0) for at in (slice(0, 5), slice(5, 12))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, round_to_bfloat16(x, rows, 5, 0))
    assert not torch.equal(whole, round_to_bfloat16(x, rows, 4, 1))


def test_bfloat16_moments_follow_float32_without_a_bias():
    """Rounded to nearest, exp_avg_sq is 4.5 % off here: it moves by a thousandth of its distance per step."""
    config = {"top_k": 8, "policy_shift_max": None, "objective_shift_max": None}
    full, half = (CapoFilter(CapoConfig(moments_dtype=d, **config), V, H) for d in ("float32", "bfloat16"))
    for capo in (full, half):
        feed(capo, 300)
    exact, stored = full.state_dict(), half.state_dict()
    assert stored["exp_avg_sq"].dtype == torch.bfloat16 and stored["step"] == 300
    assert half.model.exp_avg.nbytes * 2 == full.model.exp_avg.nbytes
    ratio = stored["exp_avg_sq"].float().sum() / exact["exp_avg_sq"].sum()
    assert float(ratio) == pytest.approx(1.0, abs=0.01)
    error = (stored["exp_avg"].float() - exact["exp_avg"]).norm() / exact["exp_avg"].norm()
    assert float(error) < 0.02
    a, b = (feed(capo, 1, seed=1)[0] for capo in (full, half))
    assert float((a.policy_shift / b.policy_shift - 1).abs().median()) < 0.05


def test_float64_inputs_are_evaluated_in_float64_with_bfloat16_moments_too():
    narrow, wide = (CapoFilter(CapoConfig(moments_dtype="bfloat16", top_k=8), V, H) for _ in range(2))
    feed(narrow, 2)
    wide.load_state_dict(narrow.state_dict())
    a, b = feed(narrow, 1, seed=1)[0], feed(wide, 1, seed=1, dtype=torch.float64)[0]
    assert b.policy_shift.dtype == torch.float64 and wide.state_dict()["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(
        a.policy_shift.double(), b.policy_shift, rtol=1e-3, atol=float(b.policy_shift.max()) * 1e-6
    )
    assert not torch.equal(a.policy_shift.double(), b.policy_shift)


def test_only_touched_rows_are_summed():
    sums = RowSums(1000, 8, torch.device("cpu"), torch.float32)
    empty = sums.nbytes
    torch.manual_seed(0)
    expected = torch.zeros(1000, 8)
    for rows in ([3, 500], [500, 7, 999], [3]):
        at, values = torch.tensor(rows), torch.randn(len(rows), 8)
        sums.count_tokens(torch.tensor(2))
        sums.count_entries(at)
        sums.add(at, values)
        expected[at] += values
    assert sums.nbytes - empty <= 8 * 8 * 4  # four rows, twice for growth
    accepted, means = sums.reduce(())
    ((rows, mean),) = means
    assert int(accepted) == 6 and rows.tolist() == [3, 7, 500, 999]
    torch.testing.assert_close(mean, expected[rows] / torch.tensor([2.0, 1, 2, 1])[:, None])
    sums.clear()
    assert sums.nbytes == empty and not list(sums.reduce(())[1])


def test_moving_takes_everything_along():
    capo = CapoFilter(CapoConfig(top_k=8), V, H)
    feed(capo, 2)
    capo.to("meta")
    left = [x for x in vars(capo.model).values() if isinstance(x, torch.Tensor) and x.device.type != "meta"]
    assert not left and all(x.device.type == "meta" for x in vars(capo.model._accepted).values() if torch.is_tensor(x))


def test_the_checksum_sees_a_bit_and_not_the_sharding():
    x = torch.randn(20, 6)
    whole = checksum(x, 0, None)
    assert whole == checksum(x[:11], 0, None) + checksum(x[11:], 11, None)
    assert whole == checksum(torch.cat((x, torch.zeros(3, 6))), 0, None)  # padding of the vocabulary
    flipped = x.clone()
    flipped.view(torch.int32)[13, 4] ^= 1
    swapped = x[[1, 0, *range(2, 20)]]
    assert len({int(whole), int(checksum(flipped, 0, None)), int(checksum(swapped, 0, None))}) == 3
