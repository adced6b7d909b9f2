# SPDX-License-Identifier: Apache-2.0
"""The KL of two policies at every token against NumPy in float64: small and large, sharded, padded,
with a temperature.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from capo_verl.core import token_kl as module
from capo_verl.core.logits import VocabShard
from capo_verl.core.token_kl import k3, token_kl
from tests.helpers.spawn import run_on_ranks

N, V = 40, 37


def policies(step: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[N, V]`` of two policies, ``step`` apart, far from 0 and with another normaliser;
    exactly float32.
    """
    rng = np.random.default_rng(seed)
    old = (rng.standard_normal((N, V)) * 4 + 20).astype(np.float32)
    new = (old + step * rng.standard_normal((N, V)) + 3 * step).astype(np.float32)
    return old.astype(np.float64), new.astype(np.float64)


def naive(old: np.ndarray, new: np.ndarray, temperature: np.ndarray | float = 1.0) -> np.ndarray:
    """sum_j p_j log(p_j / q_j), in 80-bit floats: at 1e-9 nats float64 would lose half of its
    digits here.
    """
    old, new = (
        np.asarray(x, np.longdouble) / np.asarray(temperature, np.longdouble)[..., None]
        for x in (old, new)
    )
    log_p, log_q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1,
        keepdims=True)) - x.max(-1, keepdims=True)
                    for x in (old, new))  # fmt: skip
    return (np.exp(log_p) * (log_p - log_q)).sum(-1).astype(np.float64)


@pytest.fixture(autouse=True)
def several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "scratch_elements", lambda device: 7 * V)


@pytest.mark.parametrize("step", [1e-4, 1e-2, 0.3, 3.0])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-11), (torch.float64, 1e-8, 1e-17)]
)
def test_equals_the_naive_sum(step, dtype, rtol, atol):
    old, new = policies(step)
    got = token_kl(*(torch.tensor(x, dtype=dtype) for x in (old, new)), VocabShard(V, V, 0))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), naive(old, new), rtol=rtol, atol=atol)


def test_bfloat16_is_converted_before_anything_is_subtracted():
    old, new = (torch.tensor(x).bfloat16() for x in policies(0.3))
    got = token_kl(old, new, VocabShard(V, V, 0))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(
        got.numpy(), naive(old.double().numpy(), new.double().numpy()), rtol=1e-4
    )


def test_divides_by_the_temperature_of_each_token():
    old, new = policies(0.1)
    temperature = np.linspace(0.5, 2.0, N)
    got = token_kl(
        torch.tensor(old),
        torch.tensor(new),
        VocabShard(V, V, 0),
        temperature=torch.tensor(temperature),
    )
    np.testing.assert_allclose(got.numpy(), naive(old, new, temperature), rtol=1e-8)


def test_same_policy_is_exactly_zero_and_a_shifted_normaliser_no_change():
    old, _ = policies(0.1)
    logits, shard = torch.tensor(old, dtype=torch.float32), VocabShard(V, V, 0)
    assert token_kl(logits, logits.clone(), shard).tolist() == [0.0] * N
    assert float(token_kl(logits, logits + 5, shard).max()) < 1e-11


def test_tokens_that_are_ruled_out():
    old = torch.tensor(
        [[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf], [0.0, torch.nan, 0.0]]
    )
    new = torch.tensor(
        [[1.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    )
    got = token_kl(old, new, VocabShard(3, 3, 0))
    p = 1 / (1 + np.exp(-1.0))
    assert float(got[0]) == pytest.approx(
        -0.5 * np.log(2 * p) - 0.5 * np.log(2 * (1 - p)), rel=1e-5
    )
    assert got[1] == torch.inf
    assert float(got[2]) == pytest.approx(
        np.log(1.5), rel=1e-6
    )  # what the old policy ruled out takes mass from the others
    assert got[3].isnan()


def sharded(step: float) -> tuple[torch.Tensor, torch.Tensor]:
    rank, tp = dist.get_rank(), dist.get_world_size()
    rows = -(-V // tp)
    padded = [
        torch.nn.functional.pad(
            torch.tensor(x, dtype=torch.float32), (0, rows * tp - V), value=99.0
        )
        for x in policies(step)
    ]
    mine = slice(rank * rows, (rank + 1) * rows)
    shard = VocabShard(V, rows, rank * rows)
    one = token_kl(padded[0][:, mine], padded[1][:, mine], shard, dist.group.WORLD)
    none = token_kl(padded[0][:0, mine], padded[1][:0, mine], shard, dist.group.WORLD)
    return one, none


@pytest.mark.parametrize("tp", [2, 4])
def test_a_sharded_vocabulary_gives_the_same(tp):
    for got, none in run_on_ranks(sharded, tp, 0.01):
        np.testing.assert_allclose(got.numpy(), naive(*policies(0.01)), rtol=1e-4)
        assert none.shape == (0,)


def test_a_rank_may_hold_only_padding():
    ranks = run_on_ranks(only_padding, 3)
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0] == [
        pytest.approx(float(naive(np.array([[0.0, 1.0]]), np.array([[0.5, 1.0]]))[0]), rel=1e-5)
    ]


def only_padding() -> list[float]:
    rank = dist.get_rank()
    old, new = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 1.0, -7.0]])
    mine = slice(rank, rank + 1)
    return token_kl(old[:, mine], new[:, mine], VocabShard(2, 1, rank), dist.group.WORLD).tolist()


@pytest.mark.parametrize("step", [1e-5, 1e-3, 0.2, 3.0])
def test_k3_equals_its_formula(step):
    rng = np.random.default_rng(1)
    old = (-5 * rng.random(N)).astype(np.float32)
    new = (old + step * rng.standard_normal(N)).astype(np.float32)
    r = new.astype(np.longdouble) - old.astype(np.longdouble)
    np.testing.assert_allclose(
        k3(torch.tensor(old), torch.tensor(new)).numpy(), np.expm1(r) - r, rtol=1e-4
    )


def test_k3_is_unbiased_for_the_exact_divergence():
    """Its expectation over the old policy, in closed form: sum_j p_j k3_j."""
    old, new = policies(0.2)
    log_p, log_q = (torch.tensor(x).log_softmax(-1) for x in (old, new))
    expectation = (log_p.exp() * k3(log_p.flatten(), log_q.flatten()).view(N, V)).sum(-1)
    np.testing.assert_allclose(expectation.numpy(), naive(old, new), rtol=1e-8)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"new_logits: expected \[N, 5\].*got \[2, 4\]"):
        token_kl(torch.zeros(2, 5), torch.zeros(2, 4), VocabShard(5, 5, 0))
    with pytest.raises(ValueError, match="expected the same tokens"):
        k3(torch.zeros(2), torch.zeros(3))
