# SPDX-License-Identifier: Apache-2.0
"""CapoFilter against the naive oracle on random shapes, and the invariances it promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import chunks
from tests.helpers.batches import Batch, oracle_decision
from tests.helpers.oracle import Oracle

LR = 0.02


def make(config: CapoConfig, v: int, h: int) -> tuple[CapoFilter, Oracle]:
    oracle = Oracle(
        v, h, config.optimizer_model, config.top_k, config.betas, config.eps, config.policy_shift
    )
    return CapoFilter(config, vocab_size=v, hidden_size=h), oracle


def kept_tokens(batch: Batch, accepted: np.ndarray, top_k: int | None):
    return [
        t
        for row, keep in zip(batch.tokens(top_k), accepted, strict=True)
        for t, k in zip(row, keep, strict=True)
        if k
    ]


@contextmanager
def tiny_chunks() -> Iterator[None]:
    """Many chunks even at the sizes of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("curvature", "support", "kernels.plain"):
            patch.setattr(f"capo_verl.core.{module}.scratch_elements", lambda device: 7)
        patch.setattr("capo_verl.core.filter.block_tokens", lambda device: 3)
        patch.setattr("capo_verl.core.kernels.plain.TILE_ELEMENTS", 5)
        patch.setattr("capo_verl.core.kernels.plain.BLOCK_ENTRIES", 7)
        patch.setattr("capo_verl.core.accepted.SCRATCH_ELEMENTS", 5)
        yield


def check_batch_shifts(capo: CapoFilter, oracle: Oracle, batch: Batch, accepted: np.ndarray):
    """m_H and m_F of the whole batch, before the filter and after it."""
    for shifts, keep in zip(capo.batch_shifts(), (batch.mask, accepted), strict=True):
        sequences = [
            [x for x, k in zip(row, ks, strict=True) if k]
            for row, ks in zip(batch.tokens(capo.config.top_k), keep, strict=True)
        ]
        expected = oracle.set_shifts(sequences, LR)
        np.testing.assert_allclose([float(x) for x in shifts], expected, rtol=1e-9, atol=1e-16)


def check_moments(capo: CapoFilter, oracle: Oracle):
    state = capo.state_dict()
    np.testing.assert_allclose(state["exp_avg"], oracle.exp_avg, rtol=1e-9, atol=1e-16)
    np.testing.assert_allclose(state["exp_avg_sq"], oracle.exp_avg_sq, rtol=1e-9, atol=1e-18)
    assert state["step"] == oracle.step_count


GRANULARITIES = [
    "token", "sequence", "batch", ("token", "sequence"), ("batch", "token"),
    ("token", "sequence", "batch"),
]  # fmt: skip
CONFIGS = st.builds(
    CapoConfig,
    optimizer_model=st.sampled_from(["adam", "sgd"]),
    top_k=st.one_of(st.none(), st.integers(1, 23)),
    policy_shift_max=st.sampled_from([None, 0.0, 1e-5, 1e-3]),
    objective_shift_max=st.sampled_from([None, 1e-3, 2e-2]),
    objective_shift_min=st.sampled_from(["symmetric", 0.0, -1e-3, None]),
    granularity=st.sampled_from(GRANULARITIES),
    policy_shift=st.sampled_from(["sampled", "exact"]),
    betas=st.just((0.8, 0.95)),
    eps=st.just(1e-6),
)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(2, 23))
"""Sequences, tokens of each, hidden size, vocabulary."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), shape=SHAPES, config=CONFIGS, ties=st.booleans(),
    chunks_of=st.sampled_from([nullcontext, tiny_chunks]),
)  # fmt: skip
def test_equals_oracle(seed, shape, config, ties, chunks_of):
    vocabulary, hidden = shape[3], shape[2]
    top_k = None if config.top_k is None else min(config.top_k, vocabulary)
    config = replace(config, top_k=top_k)
    rng = np.random.default_rng(seed)
    capo, oracle = make(config, vocabulary, hidden)
    with chunks_of():
        for _ in range(3):
            batch = Batch.random(rng, *shape, ties)
            out = capo.evaluate(*batch.arguments(LR))
            m_h, m_f, accepted = oracle_decision(oracle, config, batch, LR)
            np.testing.assert_allclose(out.objective_shift.numpy(), m_h, rtol=1e-9, atol=1e-16)
            np.testing.assert_allclose(out.policy_shift.numpy(), m_f, rtol=1e-9, atol=1e-18)
            np.testing.assert_array_equal(out.accepted.numpy(), accepted)
            check_batch_shifts(capo, oracle, batch, accepted)
            capo.step()
            oracle.update(kept_tokens(batch, accepted, top_k))
            if config.optimizer_model == "adam":
                check_moments(capo, oracle)


# m_F ~ d^2 and m_H ~ d: what rounding of the inputs does to them, relative to their size in the
# batch.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)]
)
@pytest.mark.parametrize("optimizer_model", ["adam", "sgd"])
def test_precision_of_inputs(dtype, tolerance, optimizer_model):
    config = CapoConfig(
        optimizer_model=optimizer_model, top_k=20, policy_shift_max=None, objective_shift_max=None
    )
    rng = np.random.default_rng(0)
    exact, low = (CapoFilter(config, vocab_size=200, hidden_size=64) for _ in range(2))
    for _ in range(3):
        batch = Batch.random(rng, 4, 16, 64, 200)
        # The same support on both sides: a token's k-th and next logit may swap when rounded, which
        # is no error of ours.
        batch.logits = torch.from_numpy(batch.logits).to(dtype).double().numpy()
        a, b = exact.evaluate(*batch.arguments(LR)), low.evaluate(*batch.arguments(LR, dtype))
        assert b.policy_shift.dtype == torch.float32
        for x, y in ((a.objective_shift, b.objective_shift), (a.policy_shift, b.policy_shift)):
            assert float((x - y).abs().max() / x.abs().max()) < tolerance
        exact.step(), low.step()
    for name in ("exp_avg", "exp_avg_sq") if optimizer_model == "adam" else ():
        x, y = exact.state_dict()[name], low.state_dict()[name]
        assert float((x - y).abs().max() / x.abs().max()) < tolerance


def test_thresholds_away_from_ties_give_the_same_decision_in_float32():
    rng = np.random.default_rng(1)
    batch = Batch.random(rng, 8, 32, 32, 100)
    probe = CapoFilter(
        CapoConfig(top_k=10, policy_shift_max=None, objective_shift_max=None), 100, 32
    )
    shifts = (
        probe.evaluate(*batch.arguments(LR))
        .policy_shift[torch.from_numpy(batch.mask)]
        .sort()
        .values
    )
    middle = int(0.9 * len(shifts))
    tau = float(shifts[middle : middle + 2].mean())
    config = CapoConfig(top_k=10, policy_shift_max=tau, objective_shift_max=None)
    masks = [
        CapoFilter(config, 100, 32).evaluate(*batch.arguments(LR, d)).accepted
        for d in (torch.float64, torch.float32)
    ]
    assert 0 < int((~masks[0] & torch.from_numpy(batch.mask)).sum()) < batch.mask.sum() / 5
    assert torch.equal(*masks)


@pytest.mark.parametrize("top_k", [6, None])
def test_micro_batches_change_nothing(top_k):
    rng = np.random.default_rng(2)
    config = CapoConfig(top_k=top_k, policy_shift_max=2e-4, objective_shift_max=None)
    whole, parts = (CapoFilter(config, 40, 12) for _ in range(2))
    for _ in range(3):
        batch = Batch.random(rng, 6, 9, 12, 40)
        arguments = batch.arguments(LR)
        a = whole.evaluate(*arguments)
        cut = [parts.evaluate(*(x[i : i + 2] for x in arguments[:-1]), LR) for i in (0, 2, 4)]
        assert 0 < int(a.accepted.sum()) < batch.mask.sum()
        for name in ("objective_shift", "policy_shift", "accepted", "in_support"):
            x, y = getattr(a, name), torch.cat([getattr(c, name) for c in cut])
            torch.testing.assert_close(
                x, y, rtol=1e-12, atol=1e-18
            )  # the moments were summed in another order
        for x, y in zip(whole.batch_shifts(), parts.batch_shifts(), strict=True):
            torch.testing.assert_close(tuple(x), tuple(y), rtol=1e-12, atol=1e-18)
        whole.step(), parts.step()
        torch.testing.assert_close(
            whole.state_dict()["exp_avg"], parts.state_dict()["exp_avg"], rtol=1e-12, atol=1e-18
        )


def test_packed_layout_equals_padded():
    rng = np.random.default_rng(3)
    batch = Batch.random(rng, 3, 8, 5, 30)
    config = CapoConfig(
        top_k=7, granularity=("token", "sequence"), policy_shift_max=1e-3, objective_shift_max=1.0
    )
    padded, packed = (CapoFilter(config, 30, 5) for _ in range(2))
    arguments = batch.arguments(LR)
    mask = arguments[4]
    a = padded.evaluate(*arguments)
    ids = torch.arange(3)[:, None].expand_as(mask)[mask]
    b = packed.evaluate(*(x[mask] for x in arguments[:-1]), LR, sequence_ids=ids, num_sequences=3)
    assert torch.equal(a.accepted[mask], b.accepted)
    torch.testing.assert_close(
        a.stages[1].policy_shift[mask], b.stages[1].policy_shift, rtol=1e-12, atol=0
    )


def test_track_changes_nothing_and_still_measures():
    rng = np.random.default_rng(4)
    knobs = {"top_k": 5, "policy_shift_max": 1e-4, "objective_shift_max": None}
    track, off = (
        CapoFilter(CapoConfig(mode="track", **knobs), 20, 6),
        CapoFilter(CapoConfig(top_k=5, policy_shift_max=None, objective_shift_max=None), 20, 6),
    )
    for _ in range(2):
        batch = Batch.random(rng, 4, 6, 6, 20)
        out = track.evaluate(*batch.arguments(LR))
        off.evaluate(*batch.arguments(LR))
        mask = torch.from_numpy(batch.mask)
        assert torch.equal(out.accepted, mask)
        assert torch.equal(out.in_trust_region, mask & (out.policy_shift < 1e-4))
        assert 0 < int(out.in_trust_region.sum()) < int(mask.sum())
        track.step(), off.step()
        assert torch.equal(
            track.state_dict()["exp_avg_sq"], off.state_dict()["exp_avg_sq"]
        )  # nothing left the gradient


@pytest.mark.parametrize("reject_all", [True, False])
def test_all_masked_or_all_rejected_leaves_the_moments(reject_all):
    rng = np.random.default_rng(5)
    capo = CapoFilter(CapoConfig(top_k=5, policy_shift_max=None, objective_shift_max=None), 20, 6)
    first = Batch.random(rng, 2, 4, 6, 20)
    capo.evaluate(*first.arguments(LR))
    capo.step()
    before = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in capo.state_dict().items()
    }
    batch = Batch.random(rng, 2, 4, 6, 20)
    if reject_all:
        capo = CapoFilter(
            CapoConfig(top_k=5, policy_shift_max=1e-30, objective_shift_max=None), 20, 6
        )
        capo.load_state_dict(before)
        batch.advantages[:] = 1.0
    else:
        batch.mask[:] = False
    out = capo.evaluate(*batch.arguments(LR))
    assert not out.accepted.any()
    _, after_filter = capo.batch_shifts()
    assert [float(x) for x in after_filter] == [0.0, 0.0]
    capo.step()
    after = capo.state_dict()
    assert before["step"] == after["step"] == 1
    assert torch.equal(before["exp_avg"], after["exp_avg"]) and torch.equal(
        before["exp_avg_sq"], after["exp_avg_sq"]
    )


def test_padding_rows_are_never_in_the_support():
    rng = np.random.default_rng(6)
    batch = Batch.random(rng, 2, 5, 6, 20)
    hidden, logits, *rest = batch.arguments(LR)
    padded = torch.cat([logits, torch.full((2, 5, 4), 50.0, dtype=logits.dtype)], dim=-1)
    for top_k in (5, None):
        config = CapoConfig(top_k=top_k)
        plain, with_rows = (
            CapoFilter(config, 20, 6),
            CapoFilter(config, 20, 6, padded_vocab_size=24),
        )
        a, b = plain.evaluate(hidden, logits, *rest), with_rows.evaluate(hidden, padded, *rest)
        assert torch.equal(a.policy_shift, b.policy_shift) and float(a.policy_shift.max()) > 0
        plain.step(), with_rows.step()
        assert torch.equal(plain.state_dict()["exp_avg"], with_rows.state_dict()["exp_avg"][:20])
        assert not with_rows.state_dict()["exp_avg"][20:].any()


def test_inputs_are_only_read():
    batch = Batch.random(np.random.default_rng(7), 2, 5, 6, 20)
    arguments = batch.arguments(LR)
    copies = [x.clone() for x in arguments[:-1]]
    CapoFilter(CapoConfig(top_k=5), 20, 6).evaluate(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments[:-1], copies, strict=True))


def test_state_round_trip_continues_bit_exactly():
    rng = np.random.default_rng(8)
    config = CapoConfig(top_k=5, policy_shift_max=1e-4)
    a, b = (CapoFilter(config, 20, 6) for _ in range(2))
    first, second = (Batch.random(rng, 4, 6, 6, 20).arguments(LR, torch.float32) for _ in range(2))
    a.evaluate(*first)
    a.step()
    b.load_state_dict(
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in a.state_dict().items()}
    )
    x, y = a.evaluate(*second), b.evaluate(*second)
    assert torch.equal(x.policy_shift, y.policy_shift) and torch.equal(x.accepted, y.accepted)
    a.step(), b.step()
    assert (
        torch.equal(a.state_dict()["exp_avg_sq"], b.state_dict()["exp_avg_sq"])
        and b.state_dict()["step"] == 2
    )


class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("granularity", ["token", ("token", "sequence", "batch")])
def test_no_tensor_grows_with_tokens_times_support_times_hidden(granularity):
    """Beyond the inputs and k numbers per token, every temporary is bounded by the scratch size."""
    v, h, k = 64, 256, 16
    config = CapoConfig(top_k=k, granularity=granularity)
    for tokens in (512, 2048):
        capo = CapoFilter(config, v, h)
        for _ in range(2):  # the second step has moments
            batch = Batch.random(np.random.default_rng(0), tokens // 64, 64, h, v)
            arguments = batch.arguments(LR, torch.float32)
            with _Allocations() as seen:
                capo.evaluate(*arguments)
                capo.batch_shifts()
                capo.step()
        scratch = chunks.scratch_elements(torch.device("cpu"))
        assert seen.largest <= max(scratch, tokens * h, tokens * k * 3) < tokens * k * h


@pytest.mark.parametrize("top_k", [6, None])
def test_skipping_masked_tokens_and_dividing_by_temperature_change_nothing(top_k):
    rng = np.random.default_rng(9)
    config = CapoConfig(
        top_k=top_k,
        granularity=("token", "sequence"),
        policy_shift_max=1e-3,
        objective_shift_max=0.5,
    )
    plain, skipping = (CapoFilter(config, 30, 8) for _ in range(2))
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None].expand(3, 9)
    for _ in range(2):
        hidden, logits, actions, advantages, mask, lr = Batch.random(rng, 3, 9, 8, 30).arguments(LR)
        a = plain.evaluate(hidden, logits / temperature[..., None], actions, advantages, mask, lr)
        b = skipping.evaluate(
            hidden, logits, actions, advantages, mask, lr, temperature=temperature, skip_masked=True
        )
        assert torch.equal(a.accepted, b.accepted) and 0 < int(a.accepted.sum()) < int(mask.sum())
        assert (
            torch.equal(a.policy_shift[mask], b.policy_shift[mask])
            and not b.policy_shift[~mask].any()
        )
        for x, y in zip(plain.batch_shifts(), skipping.batch_shifts(), strict=True):
            torch.testing.assert_close(tuple(x), tuple(y), rtol=1e-12, atol=0)
        plain.step(), skipping.step()
        assert torch.equal(plain.state_dict()["exp_avg"], skipping.state_dict()["exp_avg"])


@pytest.mark.parametrize("top_k", [6, None])
def test_a_micro_batch_without_response_tokens_is_legal_when_masked_tokens_are_skipped(top_k):
    capo = CapoFilter(CapoConfig(top_k=top_k, granularity=("token", "sequence")), 30, 8)
    for _ in range(2):
        *tensors, lr = Batch.random(np.random.default_rng(10), 2, 4, 8, 30).arguments(LR)
        tensors[-1] = torch.zeros_like(tensors[-1])
        out = capo.evaluate(*tensors, lr, skip_masked=True)
        assert (
            out.accepted.shape == (2, 4) and not out.accepted.any() and not out.policy_shift.any()
        )
        assert [float(x) for shifts in capo.batch_shifts() for x in shifts] == [0.0] * 4
        capo.step()
    assert capo.state_dict()["step"] == 0


def test_nothing_is_kept_for_batch_shifts_nobody_will_ask_for():
    batch = Batch.random(np.random.default_rng(9), 2, 5, 4, 12)
    config = CapoConfig(top_k=4, policy_shift_max=None, objective_shift_max=None)
    capo, reference = (CapoFilter(config, 12, 4) for _ in range(2))
    capo.keep_for_batch_shifts = False
    assert torch.equal(
        capo.evaluate(*batch.arguments(0.1)).policy_shift,
        reference.evaluate(*batch.arguments(0.1)).policy_shift,
    )
    assert reference._retained._kept and not capo._retained._kept
    with pytest.raises(RuntimeError, match="found no tokens"):
        capo.batch_shifts()
    capo.step()
    capo.keep_for_batch_shifts = True
    reference.step()
    for each in (capo, reference):
        each.evaluate(*batch.arguments(0.1))
    for a, b in zip(capo.batch_shifts(), reference.batch_shifts(), strict=True):
        assert float(a.policy) == float(b.policy) > 0


@pytest.mark.parametrize("top_k", [4, None])
@pytest.mark.parametrize("name", ["hidden_states", "logits", "advantages", "temperature"])
def test_what_is_outside_the_mask_leaves_no_trace(top_k, name):
    states = []
    for poison in (None, float("nan"), float("inf")):
        generator = torch.Generator().manual_seed(0)
        fields = {
            "hidden_states": torch.randn(2, 5, 8, generator=generator),
            "logits": torch.randn(2, 5, 12, generator=generator),
            "actions": torch.randint(12, (2, 5), generator=generator),
            "advantages": torch.randn(2, 5, generator=generator),
            "response_mask": torch.ones(2, 5).index_fill(1, torch.tensor([3]), 0),
            "temperature": torch.ones(2, 5),
        }
        if poison is not None:
            fields[name][:, 3] = 0.0 if name == "temperature" else poison
        capo = CapoFilter(
            CapoConfig(top_k=top_k, policy_shift_max=None, objective_shift_max=None), 12, 8
        )
        for _ in range(2):
            out = capo.evaluate(**fields, learning_rate=LR)
            shifts = torch.stack([x for pair in capo.batch_shifts() for x in pair])
            capo.step()
        states.append(
            (out.policy_shift[fields["response_mask"] > 0], shifts, capo.state_dict()["exp_avg"])
        )
    for clean, *poisoned in zip(*states, strict=True):
        assert clean.isfinite().all() and clean.any()
        for x in poisoned:
            torch.testing.assert_close(x, clean)


@pytest.mark.parametrize("granularity", ["token", "sequence", ("token", "batch")])
@pytest.mark.parametrize("optimizer_model", ["adam", "sgd"])
def test_autocast_around_it_changes_nothing(granularity, optimizer_model):
    config = CapoConfig(
        top_k=6, policy_shift_max=None, objective_shift_max=None, granularity=granularity,
        optimizer_model=optimizer_model
    )  # fmt: skip
    found = []
    for autocast in (False, True):
        rng = np.random.default_rng(0)
        capo = CapoFilter(config, vocab_size=30, hidden_size=16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(2):
                out = capo.evaluate(*Batch.random(rng, 3, 5, 16, 30).arguments(LR, torch.float32))
                shifts = capo.batch_shifts()
                capo.step()
        found.append((out.objective_shift, out.policy_shift, *shifts.before, *shifts.after))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()


def test_coverage_of_the_batch_shifts_counts_tokens_and_not_places():
    capo = CapoFilter(CapoConfig(top_k=4, policy_shift_max=None, batch_shift_tokens=14), 12, 8)
    mask = torch.zeros(1, 10)
    for tokens, covered in ((6, 1.0), (3, 6 / 9)):
        mask[:, :tokens], mask[:, tokens:] = 1, 0
        fields = (
            torch.randn(1, 10, 8),
            torch.randn(1, 10, 12),
            torch.randint(12, (1, 10)),
            torch.ones(1, 10),
            mask,
            LR,
        )
        capo.evaluate(
            *fields, skip_masked=True, max_tokens=8
        )  # 8 places each: the second call does not fit into 14
        assert float(capo.batch_shift_coverage) == pytest.approx(covered)


def test_marked_sequence_ids_do_not_break_what_looks_them_up():
    capo = CapoFilter(CapoConfig(top_k=4, granularity="sequence"), 12, 8)
    ids = torch.tensor([[0, 0, 7, 1, -3]])
    out = capo.evaluate(
        torch.randn(1, 5, 8), torch.randn(1, 5, 12), torch.zeros(1, 5, dtype=torch.int64),
        torch.ones(1, 5),
        torch.ones(1, 5), LR, sequence_ids=ids, num_sequences=2, check_values=False,
    )  # fmt: skip
    assert out.problems["sequence_ids are out of range"].tolist() == [
        [False, False, True, False, True]
    ]
