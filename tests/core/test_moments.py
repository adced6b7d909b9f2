# SPDX-License-Identifier: Apache-2.0
"""How the moments are stored: bfloat16 without a bias, sums of touched rows only, on another device
and back.
"""

from __future__ import annotations

import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.checksum import checksum
from capo_verl.core.kernels.rounding import round_to_bfloat16

V, H, LR = 40, 16, 0.02
NEVER = 1 << 40


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
    rounded = round_to_bfloat16(repeated, torch.arange(len(repeated)), 0, torch.tensor(3), 1)
    low, high = (
        torch.stack([f(rounded[:, i].float()) for i in range(4)]) for f in (torch.min, torch.max)
    )
    assert ((low <= x) & (x <= high) & (low < high)).all()  # both neighbours occur, nothing else
    assert all(len(rounded[:, i].unique()) == 2 for i in range(4))
    spread = (high - low) / 20_000**0.5
    assert ((rounded.float().mean(0) - x).abs() < 4 * spread).all()


def test_rounding_leaves_what_needs_none():
    x = torch.randn(50, 7).bfloat16().float()
    assert torch.equal(round_to_bfloat16(x, torch.arange(50), 0, torch.tensor(1), 0).float(), x)


def test_rounding_depends_on_place_and_step_only():
    x, rows = torch.randn(12, 5), torch.arange(12)

    def rounded(at: slice, columns: slice, step: int = 4, salt: int = 0) -> torch.Tensor:
        return round_to_bfloat16(x[at, columns], rows[at], columns.start, torch.tensor(step), salt)

    whole = rounded(slice(0, 12), slice(0, 5))
    assert torch.equal(
        whole, torch.cat([rounded(at, slice(0, 5)) for at in (slice(0, 5), slice(5, 12))])
    )
    assert torch.equal(
        whole, torch.cat([rounded(slice(0, 12), c) for c in (slice(0, 2), slice(2, 5))], dim=1)
    )
    assert not torch.equal(whole, rounded(slice(0, 12), slice(0, 5), step=5))
    assert not torch.equal(whole, rounded(slice(0, 12), slice(0, 5), salt=1))


def test_bfloat16_moments_follow_float32_without_a_bias():
    """Rounded to nearest, exp_avg_sq is 4.5 % off here: it moves by a thousandth of its distance
    per step.
    """
    config = {"top_k": 8, "policy_shift_max": None, "objective_shift_max": None}
    full, half = (
        CapoFilter(CapoConfig(moments_dtype=d, **config), V, H) for d in ("float32", "bfloat16")
    )
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
    narrow, wide = (
        CapoFilter(CapoConfig(moments_dtype="bfloat16", top_k=8), V, H) for _ in range(2)
    )
    feed(narrow, 2)
    wide.load_state_dict(narrow.state_dict())
    a, b = feed(narrow, 1, seed=1)[0], feed(wide, 1, seed=1, dtype=torch.float64)[0]
    assert (
        b.policy_shift.dtype == torch.float64
        and wide.state_dict()["exp_avg"].dtype == torch.bfloat16
    )
    torch.testing.assert_close(
        a.policy_shift.double(), b.policy_shift, rtol=1e-3, atol=float(b.policy_shift.max()) * 1e-6
    )
    assert not torch.equal(a.policy_shift.double(), b.policy_shift)


def kept_and_folded(dtype: torch.dtype, fold_at: int, micro_batches: int) -> CapoFilter:
    capo = CapoFilter(CapoConfig(top_k=8, policy_shift_max=None, objective_shift_max=None), V, H)
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capo_verl.core.accepted.fold_limit", lambda rows, hidden_size: fold_at)
        for _ in range(2):
            hidden, logits = (torch.randn(12, n, generator=generator).to(dtype) for n in (H, V))
            actions = torch.randint(V, (12,), generator=generator)
            for part in range(0, 12, 12 // micro_batches):
                at = slice(part, part + 12 // micro_batches)
                n = 12 // micro_batches
                capo.evaluate(hidden[at], logits[at], actions[at], torch.ones(n), torch.ones(n), LR)
            assert (capo.model._accepted._sums is None) == (fold_at == NEVER)
            capo.step()
    return capo


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_folding_changes_memory_and_nothing_else(dtype, tolerance):
    whole = kept_and_folded(dtype, NEVER, 1).state_dict()
    for fold_at, micro_batches in ((NEVER, 4), (0, 1), (0, 4), (200, 4)):
        folded = kept_and_folded(dtype, fold_at, micro_batches).state_dict()
        for name in ("exp_avg", "exp_avg_sq"):
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(
                folded[name], whole[name], rtol=tolerance, atol=scale * tolerance
            )
        assert folded["step"] == 2


def test_hidden_states_must_stay_as_they_were():
    capo = CapoFilter(CapoConfig(top_k=8, policy_shift_max=None, objective_shift_max=None), V, H)
    hidden, n = torch.randn(3, H), 3
    arguments = torch.randn(n, V), torch.randint(V, (n,)), torch.ones(n), torch.ones(n), LR
    capo.evaluate(hidden, *arguments)
    hidden[1, 2] += 1
    with pytest.raises(RuntimeError, match=r"hidden_states were modified in place .*pass a copy"):
        capo.step()
    capo.discard()
    capo.evaluate(hidden, *arguments, skip_masked=True)  # has copied what it needs
    hidden += 1
    capo.step()
    assert capo.state_dict()["step"] == 1


def test_moving_takes_everything_along():
    capo = CapoFilter(CapoConfig(top_k=8), V, H)
    feed(capo, 2)
    capo.to("meta")
    left = [
        x
        for x in vars(capo.model).values()
        if isinstance(x, torch.Tensor) and x.device.type != "meta"
    ]
    assert not left and all(
        x.device.type == "meta" for x in vars(capo.model._accepted).values() if torch.is_tensor(x)
    )


def test_the_checksum_sees_a_bit_and_not_the_sharding():
    x = torch.randn(20, 6)
    whole = checksum(x, 0, None)
    assert whole == checksum(x[:11], 0, None) + checksum(x[11:], 11, None)
    assert whole == checksum(
        torch.cat((x, torch.zeros(3, 6))), 0, None
    )  # padding of the vocabulary
    flipped = x.clone()
    flipped.view(torch.int32)[13, 4] ^= 1
    swapped = x[[1, 0, *range(2, 20)]]
    assert len({int(whole), int(checksum(flipped, 0, None)), int(checksum(swapped, 0, None))}) == 3
