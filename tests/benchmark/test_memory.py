# SPDX-License-Identifier: Apache-2.0
"""The memory meter against allocations of known size."""

from __future__ import annotations

import torch

from capo_verl.benchmark.batch import make_batch
from capo_verl.benchmark.contenders import NAIVE, accept_all
from capo_verl.benchmark.memory import Usage, measure_memory, scratch
from capo_verl.benchmark.naive import NaiveFilter
from capo_verl.benchmark.workload import Workload

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


def test_the_naive_formulation_holds_its_four_tensors():
    workload = Workload("tiny", 400, 32, 1, 20, (64,), "cpu")
    naive = NAIVE.build(workload, accept_all(workload), torch.float32)
    batch = make_batch(workload, 64, seed=0)
    for call in naive.stages(batch).values():
        call()
    four = NaiveFilter.nbytes(64, 20, 32, torch.float32)
    usage = measure_memory("cpu", {"evaluate": naive.stages(batch)["evaluate"]})["evaluate"]
    assert four <= usage.peak <= 1.15 * four  # the rest: support, probabilities, results
    assert four / 4 <= usage.held <= 1.15 * four / 4
