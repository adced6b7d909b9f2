# SPDX-License-Identifier: Apache-2.0
"""The memory meter against allocations of known size."""

from __future__ import annotations

import pytest
import torch

from capo_verl.commands.measure import contenders
from capo_verl.commands.measure.batch import make_batch
from capo_verl.commands.measure.contenders import NAIVE, NAIVE_REUSED, Kind, accept_all
from capo_verl.commands.measure.memory import Usage, measure_memory, scratch
from capo_verl.commands.measure.workload import Workload

KIB = 1024


def kib(n: int) -> torch.Tensor:
    return torch.empty(n * KIB, dtype=torch.uint8)


def test_peak_and_held_of_known_allocations():
    def call():
        a = kib(300)
        b = kib(200)
        del a
        c = kib(50)
        del b
        return c

    assert measure_memory("cpu", {"call": call}) == {"call": Usage(peak=500 * KIB, held=50 * KIB)}


def test_a_later_call_frees_what_an_earlier_one_kept():
    kept = []

    def keep():
        kept.append(kib(400))

    def release():
        extra = kib(30)
        kept.clear()
        more = kib(100)
        del extra, more

    usage = measure_memory("cpu", {"keep": keep, "release": release, "nothing": lambda: None})
    assert usage == {
        "keep": Usage(400 * KIB, 400 * KIB),
        "release": Usage(430 * KIB, 0),
        "nothing": Usage(0, 0),
    }
    assert scratch(0, usage["keep"]) == 0
    assert scratch(usage["keep"].held, usage["release"]) == 30 * KIB


def test_memory_allocated_before_does_not_count():
    before = kib(1000)
    usage = measure_memory("cpu", {"call": lambda: before[: 500 * KIB].clone()})
    assert usage["call"] == Usage(500 * KIB, 500 * KIB)


def test_temporaries_inside_an_operator_count():
    x = torch.ones(256, 1024)  # 1 MiB
    usage = measure_memory("cpu", {"call": lambda: x.logsumexp(-1)})["call"]
    assert usage.held == 256 * 4
    assert 1024 * KIB < usage.peak < 1100 * KIB  # exp(x - max) exists only inside the operator


N, K, H = 64, 20, 96
TENSOR = N * K * H * 4
WORKLOAD = Workload("tiny", 400, H, 1, K, (N,), "cpu")


def measure_naive(kind: Kind, tokens: int) -> dict[str, Usage]:
    naive = kind.build(WORKLOAD, accept_all(WORKLOAD), torch.float32)
    stages = naive.stages(make_batch(WORKLOAD, tokens, seed=0))
    for call in stages.values():
        call()  # from now on P(g) is Adam's
    return measure_memory("cpu", stages)


@pytest.mark.parametrize(("kind", "tensors"), [(NAIVE, 7), (NAIVE_REUSED, 4)])
def test_the_tensors_that_the_naive_formulation_holds_at_once(kind, tensors):
    usage = measure_naive(kind, N)
    assert kind.tensor_bytes(WORKLOAD, N) == tensors * TENSOR
    assert (
        tensors <= usage["evaluate"].peak / TENSOR < tensors + 0.2
    )  # the rest: support, probabilities, results
    assert 1 <= usage["evaluate"].held / TENSOR < 1.2  # the gradient
    assert max(usage[stage].peak for stage in ("accumulate", "update")) < usage["evaluate"].peak


@pytest.mark.parametrize("kind", [NAIVE, NAIVE_REUSED])
def test_several_batches_need_the_tensors_of_one(kind, monkeypatch):
    monkeypatch.setattr(contenders, "BATCH_TOKENS", N)
    one, usage = measure_naive(kind, N), measure_naive(kind, 2 * N + N // 2)
    assert list(usage) == [
        "evaluate", "accumulate", "evaluate 2", "accumulate 2", "evaluate 3", "accumulate 3",
        "update",
    ]  # fmt: skip
    sums = one["accumulate"].held
    assert 400 * H * 4 < sums < 500 * H * 4  # V rows, and the results
    assert max(u.peak for u in usage.values()) <= one["evaluate"].peak + 1.1 * sums
    assert usage["evaluate 3"].peak - sums < 0.55 * one["evaluate"].peak  # half a batch
