# SPDX-License-Identifier: Apache-2.0
"""The filter without logits: it decides as on the product of hidden states and LM head, which it
never holds whole.
"""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import ProjectedLogits, chunks
from capo_verl.core.kernels import plain
from capo_verl.core.kernels.plain import BLOCK_ENTRIES
from capo_verl.core.logits import ProjectedRows, VocabShard
from capo_verl.core.support import find_support
from tests.core.test_filter import kept_tokens, make
from tests.helpers.batches import Batch, oracle_decision
from tests.helpers.spawn import run_on_ranks

LR = 0.02
V, H = 21, 6


class Model:
    """A random LM head, and batches whose logits are its product with the hidden states, in float64
    on the side.
    """

    def __init__(self, rng: np.random.Generator, v: int = V, h: int = H, bias: bool = True):
        self.weight = 2 * rng.standard_normal((v, h))
        self.bias = rng.standard_normal(v) if bias else None

    def head(self, dtype: torch.dtype = torch.float64, rows: slice = slice(None)):
        bias = None if self.bias is None else torch.from_numpy(self.bias[rows]).to(dtype)
        return ProjectedLogits(torch.from_numpy(self.weight[rows]).to(dtype), bias)

    def batch(
        self, rng: np.random.Generator, b: int, t: int, temperature: np.ndarray | float = 1.0
    ) -> Batch:
        batch = Batch.random(rng, b, t, self.weight.shape[1], len(self.weight))
        logits = batch.hidden @ self.weight.T + (0.0 if self.bias is None else self.bias)
        batch.logits = logits / (
            temperature[..., None] if isinstance(temperature, np.ndarray) else temperature
        )
        return batch


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(2, 23)),
    top_k=st.one_of(st.none(), st.integers(1, 23)),
    optimizer_model=st.sampled_from(["adam", "sgd"]),
    granularity=st.sampled_from(["token", "sequence", ("batch", "token")]),
    bias=st.booleans(),
    skip_masked=st.booleans(),
    tiny_scratch=st.booleans(),
)
def test_equals_oracle(
    seed, shape, top_k, optimizer_model, granularity, bias, skip_masked, tiny_scratch
):  # fmt: skip
    """Two micro-batches a step, temperatures of their own, float64: decisions, shifts, batch shifts
    and moments.
    """
    b, t, h, v = shape
    config = CapoConfig(
        optimizer_model=optimizer_model, top_k=None if top_k is None else min(top_k, v),
        policy_shift_max=1e-4,
        objective_shift_max=2e-2, granularity=granularity, betas=(0.8, 0.95), eps=1e-6,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    model = Model(rng, v, h, bias)
    capo, oracle = make(config, v, h)
    with pytest.MonkeyPatch.context() as patch:
        if tiny_scratch:
            _tiny_scratch(patch)
        for _ in range(3):
            kept = []
            expected_sets: list[list[list]] = [[], []]
            for _ in range(2):
                temperature = rng.uniform(0.5, 2.0, (b, t))
                batch = model.batch(rng, b, t, temperature)
                hidden, _, *rest = batch.arguments(LR)
                out = capo.evaluate(
                    hidden, model.head(), *rest, temperature=torch.from_numpy(temperature),
                    skip_masked=skip_masked,
                )  # fmt: skip
                m_h, m_f, accepted = oracle_decision(oracle, config, batch, LR)
                here = batch.mask if skip_masked else np.ones_like(batch.mask)
                np.testing.assert_allclose(
                    out.objective_shift.numpy()[here], m_h[here], rtol=1e-9, atol=1e-16
                )
                np.testing.assert_allclose(
                    out.policy_shift.numpy()[here], m_f[here], rtol=1e-9, atol=1e-18
                )
                np.testing.assert_array_equal(out.accepted.numpy(), accepted)
                kept += kept_tokens(batch, accepted, config.top_k)
                for sequences, keep in zip(expected_sets, (batch.mask, accepted), strict=True):
                    tokens = batch.tokens(config.top_k)
                    sequences += [
                        [x for x, k in zip(row, ks, strict=True) if k]
                        for row, ks in zip(tokens, keep, strict=True)
                    ]
            for shifts, sequences in zip(capo.batch_shifts(), expected_sets, strict=True):
                np.testing.assert_allclose(
                    [float(x) for x in shifts],
                    oracle.set_shifts(sequences, LR),
                    rtol=1e-9,
                    atol=1e-16,
                )
            capo.step()
            oracle.update(kept)
            if optimizer_model == "adam":
                state = capo.state_dict()
                np.testing.assert_allclose(state["exp_avg"], oracle.exp_avg, rtol=1e-9, atol=1e-16)
                np.testing.assert_allclose(
                    state["exp_avg_sq"], oracle.exp_avg_sq, rtol=1e-9, atol=1e-18
                )


def _tiny_scratch(patch: pytest.MonkeyPatch) -> None:
    for module in ("curvature", "support", "kernels.plain"):
        patch.setattr(f"capo_verl.core.{module}.scratch_elements", lambda device: 7)
    patch.setattr("capo_verl.core.logits.block_elements", lambda device: 7)
    patch.setattr("capo_verl.core.kernels.plain.BLOCK_ENTRIES", 5)
    patch.setattr("capo_verl.core.accepted.SCRATCH_ELEMENTS", 5)


@pytest.mark.parametrize("top_k", [7, None])
@pytest.mark.parametrize("temperature", [0.6, 0.7, 1.3])
def test_divides_bfloat16_logits_in_float32(temperature, top_k):
    """Probabilities, of the support and of its snapshot, are those of the rounded logits divided in
    float64: a temperature or a quotient in bfloat16 would be 1e-3 off.
    """
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(n, 32, generator=generator).bfloat16() for n in (5, 40)
    )  # fmt: skip
    rows = ProjectedRows(ProjectedLogits(weight), hidden, torch.full((5,), temperature))
    actions, shard = torch.zeros(5, dtype=torch.int64), VocabShard(40, 40, 0)
    support = find_support(rows, actions, top_k, shard, torch.float32, None, plain)
    logits = torch.nn.functional.linear(hidden, weight).double() / temperature
    expected = logits.topk(top_k or 40).values.softmax(-1)
    joined = type(support).concatenate([support.snapshot(), support.snapshot()])
    for some in (support, support.snapshot(), joined):
        (block,) = some.blocks(1 << 20)
        found = block.probs.double().sort(descending=True).values
        each = expected.repeat(len(found) // 5, 1)
        torch.testing.assert_close(found, each, rtol=3e-5, atol=0)


@pytest.mark.parametrize("top_k", [7, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_evaluation_of_the_heads_own_logits(dtype, top_k):
    """In the dtype of the model, what the LM head would have given; divided by the temperature in
    float32, as a fused cross-entropy does.
    """
    rng = np.random.default_rng(4)
    model = Model(rng, 60, 16, bias=False)
    config = CapoConfig(top_k=top_k, policy_shift_max=None, objective_shift_max=None)
    fused, plain = CapoFilter(config, 60, 16), CapoFilter(config, 60, 16)
    head = model.head(dtype)
    for _ in range(2):
        hidden, _, *rest = model.batch(rng, 3, 9).arguments(LR, dtype)
        temperature = torch.from_numpy(rng.uniform(0.5, 2.0, (3, 9))).float()
        logits = (hidden @ head.weight.T).float() / temperature[..., None]
        a = fused.evaluate(hidden, head, *rest, temperature=temperature)
        b = plain.evaluate(hidden, logits, *rest)
        # A product of another shape may sum in another order: one rounding of a float32; in
        # bfloat16 it rounds away.
        tolerance = (
            {"rtol": 2e-5, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(a.policy_shift, b.policy_shift, **tolerance)
        torch.testing.assert_close(a.objective_shift, b.objective_shift, **tolerance)
        assert torch.equal(a.in_support, b.in_support) and a.policy_shift.count_nonzero() > 0
        fused.step(), plain.step()


@pytest.mark.parametrize("top_k", [5, None])
def test_logits_never_exist_whole(top_k, monkeypatch):
    """Counted: elements of every piece that is read, and how many pieces are alive at once."""
    tokens, v, h = 3000, 500, 8
    bound = chunks.scratch_elements(torch.device("cpu"))
    monkeypatch.setattr("capo_verl.core.logits.block_elements", lambda device: bound)
    rng = np.random.default_rng(0)
    model = Model(rng, v, h)
    alive: list[weakref.ref] = []
    largest = most_alive = reads = 0
    read = ProjectedRows.read

    def counted(self, *args):
        nonlocal largest, most_alive, reads
        logits = read(self, *args)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(logits)]
        largest, most_alive, reads = (
            max(largest, logits.numel()),
            max(most_alive, len(alive)),
            reads + 1,
        )
        return logits

    monkeypatch.setattr(ProjectedRows, "read", counted)
    batch_shift_tokens = 0 if top_k is None else 65536
    config = CapoConfig(top_k=top_k, policy_shift_max=1e-4, batch_shift_tokens=batch_shift_tokens)
    capo = CapoFilter(config, v, h)
    for _ in range(2):
        hidden, _, *rest = model.batch(rng, 1, tokens).arguments(LR, torch.float32)
        capo.evaluate(hidden, model.head(torch.float32), *rest)
    if batch_shift_tokens:
        capo.batch_shifts()
    capo.step()
    assert tokens * v > 5 * max(bound, BLOCK_ENTRIES)
    assert 0 < largest <= max(bound, BLOCK_ENTRIES) and most_alive <= 2
    if top_k is not None:
        assert reads == 2 * -(-tokens // (bound // v))  # every token once


def test_the_head_may_be_gone_at_the_batch_shifts():
    rng = np.random.default_rng(1)
    model = Model(rng)
    config = CapoConfig(top_k=None, policy_shift_max=3e-4)
    kept, freed = CapoFilter(config, V, H), CapoFilter(config, V, H)
    hidden, _, *rest = model.batch(rng, 2, 9).arguments(LR)
    for _ in range(2):
        kept.evaluate(hidden, model.head(), *rest)
        head = model.head()
        head = ProjectedLogits(head.weight.clone(), head.bias.clone())
        freed.evaluate(hidden, head, *rest)
        head.weight.fill_(torch.nan), head.bias.fill_(torch.nan)
    expected, found = kept.batch_shifts(), freed.batch_shifts()
    assert float(expected.before.policy) > 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_of_another_size_is_refused(name):
    capo = CapoFilter(CapoConfig(top_k=5), V, H)
    rng = np.random.default_rng(0)
    hidden, _, *rest = Model(rng).batch(rng, 1, 3).arguments(LR)
    head = {"weight": torch.zeros(V, H), "bias": torch.zeros(V)}
    head[name] = head[name][:-1]
    wanted, got = {
        "weight": (rf"\[{V}, {H}\]", r"\[20, 6\]"),
        "bias": (rf"\[{V}\]", r"\[20\]"),
    }[name]
    expected = rf"ProjectedLogits.{name} to be a float tensor {wanted} .*, got float32 {got}"
    with pytest.raises(ValueError, match=expected):
        capo.evaluate(hidden, ProjectedLogits(**head), *rest)


def test_a_bad_row_of_the_head_is_named_as_bad_logits():
    rng = np.random.default_rng(0)
    model = Model(rng)
    model.weight[3, 2] = np.nan
    capo = CapoFilter(CapoConfig(top_k=5), V, H)
    batch = model.batch(rng, 1, 3)
    batch.mask[:] = True
    hidden, _, *rest = batch.arguments(LR)
    with pytest.raises(ValueError, match="logits are not finite at 3 of 3 response tokens"):
        capo.evaluate(hidden, model.head(), *rest)


def on_two_ranks(config: CapoConfig) -> list[dict]:
    """Half of the rows of the LM head on each rank, 11 and 10 of 21; or all, without a process
    group.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    capo = CapoFilter(config, V, H, tp_group=group)
    rng = np.random.default_rng(3)
    model = Model(rng)
    padding = -len(model.weight) % (2 if group else 1)
    model.weight = np.pad(model.weight, ((0, padding), (0, 0)), constant_values=9.0)
    model.bias = np.pad(model.bias, (0, padding), constant_values=99.0)
    rows = slice(capo.shard.start, capo.shard.start + capo.shard.rows)
    seen = []
    for _ in range(3):
        batch = Batch.random(rng, 2, 9, H, V)
        hidden, _, *rest = batch.arguments(LR)
        out = capo.evaluate(
            hidden, model.head(rows=rows), *rest, temperature=torch.full((2, 9), 0.7)
        )
        shifts = torch.stack([torch.stack(pair) for pair in capo.batch_shifts()])
        capo.step()
        seen.append({"m_f": out.policy_shift, "m_h": out.objective_shift, "accepted": out.accepted,
            "batch": shifts,
                     "tokens": int(batch.mask.sum())})  # fmt: skip
    return seen


@pytest.mark.parametrize("top_k", [5, None])
def test_a_sharded_head_decides_as_a_whole_one(top_k):
    config = CapoConfig(top_k=top_k, policy_shift_max=6e-4, objective_shift_max=None)
    whole = on_two_ranks(config)
    for step in whole[1:]:  # before the first update P(g) = g
        assert 0 < int(step["accepted"].sum()) < step["tokens"]
    for ranks in run_on_ranks(on_two_ranks, 2, config):
        for mine, expected in zip(ranks, whole, strict=True):
            assert torch.equal(mine["accepted"], expected["accepted"])
            for name in ("m_f", "m_h", "batch"):
                torch.testing.assert_close(mine[name], expected[name], rtol=1e-11, atol=1e-16)
