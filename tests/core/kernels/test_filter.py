# SPDX-License-Identifier: Apache-2.0
"""CapoFilter on Triton's kernels: decisions and moments are those of float64, in every way of
cutting the batch.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import ProjectedLogits, curvature_penalty
from capo_verl.core.kernels import fused
from tests.helpers.syncs import recorded_syncs

V, H, K, LR, TAU = 40, 24, 7, 0.02, 2e-3


def mini_batch(generator: torch.Generator, device: torch.device) -> dict:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    return {
        "hidden_states": (draw(4, 6, H) / H**0.5).float().double(),
        "logits": (2 * draw(4, 6, V)).float().double(),
        "actions": torch.randint(V, (4, 6), generator=generator).to(device),
        "advantages": draw(4, 1),
        "response_mask": (torch.rand(4, 6, generator=generator) < 0.7).to(device),
    }


def run(
    device, kernels: str, dtype: torch.dtype, micro_batches: int = 1, **options
) -> tuple[list, dict]:
    """Three optimizer steps.

    Returns per step m_H, m_F, accepted and the batch shifts, and the moments.
    """
    config = CapoConfig(top_k=K, policy_shift_max=TAU, objective_shift_max=None)
    capo = CapoFilter(config, V, H, device=device, kernels=kernels)
    generator, steps = torch.Generator().manual_seed(1), []
    for _ in range(3):
        batch = mini_batch(generator, device)
        parts = []
        for part in range(micro_batches):
            at = slice(part * 4 // micro_batches, (part + 1) * 4 // micro_batches)
            share = {
                n: x[at].to(dtype) if x.is_floating_point() else x[at] for n, x in batch.items()
            }
            parts.append(capo.evaluate(**share, learning_rate=LR, **options))
        mask = batch["response_mask"]
        columns = (
            torch.cat([getattr(p, n) for p in parts])
            for n in ("objective_shift", "policy_shift", "accepted")
        )
        shifts = torch.stack([x for pair in capo.batch_shifts() for x in pair])
        steps.append(([x[mask].cpu() for x in columns], shifts.cpu()))
        capo.step()
    return steps, capo.state_dict()


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"skip_masked": True}, {"skip_masked": True, "max_tokens": 22}], ids=str
)
def test_decides_as_float64_does(micro_batches, options, device):
    exact, state = run(device, "torch", torch.float64)
    steps, ours = run(device, "triton", torch.float32, micro_batches, **options)
    assert all(
        0 < int(expected[2].sum()) < len(expected[2]) for expected, _ in exact[1:]
    )  # some rejected
    for (expected, batch), (found, ours_of_batch) in zip(exact, steps, strict=True):
        margin = (expected[1] / TAU - 1).abs().min()
        assert margin > 1e-4  # no token near the threshold
        assert torch.equal(expected[2], found[2])
        for a, b in zip(expected[:2], found[:2], strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=float(a.abs().max()) * 2e-6)
        torch.testing.assert_close(ours_of_batch.double(), batch, rtol=1e-4, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        scale = float(state[name].abs().max())
        torch.testing.assert_close(ours[name].double(), state[name], rtol=1e-4, atol=scale * 1e-6)
    assert ours["step"] == state["step"] == 3


def test_folded_row_sums_give_the_same(device, monkeypatch):
    kept, state = run(device, "triton", torch.float32, 2)
    monkeypatch.setattr("capo_verl.core.accepted.fold_limit", lambda rows, hidden_size: 0)
    folded, ours = run(device, "triton", torch.float32, 2)
    assert all(torch.equal(a[0][2], b[0][2]) for a, b in zip(kept, folded, strict=True))
    for name in ("exp_avg", "exp_avg_sq"):
        scale = float(state[name].abs().max())
        torch.testing.assert_close(ours[name], state[name], rtol=1e-4, atol=scale * 1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_deterministic_mode_changes_no_bit(kernels, device):
    torch.use_deterministic_algorithms(False)
    default, state = run(device, kernels, torch.float32, 2)
    torch.use_deterministic_algorithms(True)
    strict, ours = run(device, kernels, torch.float32, 2)
    for (a, batch_a), (b, batch_b) in zip(default, strict, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and torch.equal(
            batch_a, batch_b
        )
    assert torch.equal(state["exp_avg"], ours["exp_avg"]) and torch.equal(
        state["exp_avg_sq"], ours["exp_avg_sq"]
    )


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("optimizer_model", ["adam", "sgd"])
@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_nothing_waits_for_the_device(folded, optimizer_model, moments_dtype, device, monkeypatch):
    """By inspection of the operations; on a GPU, CUDA itself is asked to complain.

    Neither a first step nor a later one.
    """
    monkeypatch.setattr(
        "capo_verl.core.accepted.fold_limit", lambda rows, hidden_size: 0 if folded else 1 << 40
    )
    # Operations are recorded by kernel launches as well: the interpreter's own do not count.
    for name in ("_partial_sums_kernel", "_best_keys_kernel"):
        module = fused.curvature_kernel if "partial" in name else fused.support_kernel
        monkeypatch.setattr(module, name, Unrecorded(getattr(module, name)))
    for name in ("_row_sums_kernel", "_update_kernel", "_move_kernel"):
        monkeypatch.setattr(
            fused.moment_kernels, name, Unrecorded(getattr(fused.moment_kernels, name))
        )
    config = CapoConfig(top_k=K, optimizer_model=optimizer_model, moments_dtype=moments_dtype)
    capo = CapoFilter(config, V, H, device=device, kernels="triton")
    capo.keep_for_batch_shifts = False
    batch = mini_batch(torch.Generator().manual_seed(0), device)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
    options = {
        "skip_masked": True,
        "max_tokens": 24,
        "temperature": torch.ones(4, 6, device=device),
    }
    for _ in range(2):
        with recorded_syncs() as found, cuda_complains(device):
            for _ in range(2):
                out = capo.evaluate(**batch, **options, learning_rate=LR, check_values=False)
            capo.step()
        assert found == []
        assert out.accepted.shape == (4, 6)
    assert optimizer_model == "sgd" or capo.state_dict()["step"] > 0


@pytest.mark.parametrize(
    "knobs",
    [
        {"weighting": "soft", "policy_shift": "exact"},
        {"policy_penalty": 1.0, "objective_penalty": 1.0},
    ],
    ids=["soft", "penalties"],
)  # fmt: skip
def test_what_adapts_waits_for_nothing_either(knobs, device, monkeypatch):
    for module, name in (
        (fused.curvature_kernel, "_partial_sums_kernel"),
        (fused.support_kernel, "_best_keys_kernel"),
    ):
        monkeypatch.setattr(module, name, Unrecorded(getattr(module, name)))
    for name in ("_row_sums_kernel", "_update_kernel", "_move_kernel"):
        monkeypatch.setattr(
            fused.moment_kernels, name, Unrecorded(getattr(fused.moment_kernels, name))
        )
    adaptive = {
        "policy_shift_max": {"target_rejection": 0.2},
        "max_rejection": 0.3,
        "objective_shift_max": None,
    }
    capo = CapoFilter(
        CapoConfig(top_k=K, **adaptive, **knobs), V, H, device=device, kernels="triton"
    )
    plain = CapoFilter(capo.config, V, H, device=device, kernels="torch")
    capo.keep_for_batch_shifts = False
    batch = mini_batch(torch.Generator().manual_seed(0), device)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
    logits = batch["logits"].requires_grad_()
    options = {
        "skip_masked": True,
        "max_tokens": 24,
        "temperature": torch.ones(4, 6, device=device),
        "check_values": False,
    }
    for _ in range(3):
        with recorded_syncs() as found, cuda_complains(device):
            out = capo.evaluate(**batch, **options, learning_rate=LR)
            gradient = None
            if out.penalty_terms is not None:
                (gradient,) = torch.autograd.grad(
                    curvature_penalty(logits, out.penalty_terms).sum(), logits
                )
            capo.step()
        assert found == []
        expected = plain.evaluate(**batch, **options, learning_rate=LR)
        plain.step()
        torch.testing.assert_close(out.weights, expected.weights, rtol=1e-3, atol=1e-4)
        if gradient is not None:
            terms = expected.penalty_terms
            (from_plain,) = torch.autograd.grad(curvature_penalty(logits, terms).sum(), logits)
            assert from_plain.any()
            torch.testing.assert_close(
                gradient, from_plain, rtol=1e-3, atol=1e-3 * float(from_plain.abs().max())
            )
    assert 0 < float(capo.policy_shift_max) < 1


class Unrecorded:
    """A kernel whose launch is not looked into."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return self._kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def cuda_complains(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_strided_inputs_are_read_as_they_are(kernels, device):
    batch = mini_batch(torch.Generator().manual_seed(3), device)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
    apart = dict(batch)
    for name in ("actions", "hidden_states", "logits", "response_mask"):
        wide = batch[name].repeat_interleave(2, dim=-1)
        apart[name] = wide[..., ::2]
        assert torch.equal(apart[name], batch[name]) and not apart[name].is_contiguous()
    temperature = torch.tensor(0.7, device=device).expand(4, 6)  # strides of 0
    found = []
    for fields, t in ((batch, temperature.contiguous()), (apart, temperature)):
        capo = CapoFilter(
            CapoConfig(top_k=K, policy_shift_max=None), V, H, device=device, kernels=kernels
        )
        for _ in range(2):
            out = capo.evaluate(**fields, learning_rate=LR, temperature=t)
            capo.step()
        found.append((out.policy_shift, out.in_support, capo.state_dict()["exp_avg"]))
    assert found[0][1].any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_too_small_a_bound_is_noticed(device):
    batch = mini_batch(torch.Generator().manual_seed(0), device)
    capo = CapoFilter(CapoConfig(top_k=K), V, H, device=device)
    tokens = int(batch["response_mask"].sum())
    with pytest.raises(ValueError, match="there are more response tokens than max_tokens"):
        capo.evaluate(**batch, learning_rate=LR, skip_masked=True, max_tokens=tokens - 1)
    capo.evaluate(**batch, learning_rate=LR, skip_masked=True, max_tokens=tokens)


def test_kernels_are_chosen_by_device_or_name(device):
    from capo_verl.core.kernels import choose, fused, plain

    assert choose(torch.device("cpu")) is plain and choose(torch.device("cuda")) is fused
    assert choose(device, "triton") is fused and choose(torch.device("cuda"), "torch") is plain
    with pytest.raises(ValueError, match="kernels=.cuda.: expected one of torch, triton"):
        CapoFilter(CapoConfig(top_k=K), V, H, kernels="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_lm_head_in_place_of_logits(dtype, device, monkeypatch):
    """In blocks of three tokens, with temperatures of their own that divide in float32: as on the
    whole product, bit for bit.
    """
    monkeypatch.setattr("capo_verl.core.logits.block_elements", lambda device: 3 * V)
    generator = torch.Generator().manual_seed(2)
    # Small integers: their products are exact in whatever order they are summed up.
    weight, hidden = (
        torch.randint(-2, 3, s, generator=generator).to(device, dtype) for s in ((V, H), (4, 6, H))
    )
    batch = mini_batch(generator, device) | {"hidden_states": hidden}
    temperature = torch.rand(4, 6, generator=generator).to(device) + 0.5
    config = CapoConfig(top_k=K, policy_shift_max=TAU, objective_shift_max=None)
    found = []
    for logits in ((hidden @ weight.T).float(), ProjectedLogits(weight)):
        capo = CapoFilter(config, V, H, device=device, kernels="triton")
        out = capo.evaluate(
            **batch | {"logits": logits},
            learning_rate=LR,
            temperature=temperature,
            skip_masked=True,
            max_tokens=22,
        )
        found.append((out.objective_shift, out.policy_shift, out.in_support))
    assert float(found[0][1].max()) > 0
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
