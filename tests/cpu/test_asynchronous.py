# SPDX-License-Identifier: Apache-2.0
"""What the asynchronous trainers need on a CPU: a way to the rollout servers, copies of the model
that are copies.
"""

from __future__ import annotations

import functools

import pytest
import torch

from capo_verl.cpu.replay_buffer import POLL_SECONDS, patch
from tests.cpu.asynchronous_cases import TRAINERS, WEIGHTS, step_and_go_back, transfer
from tests.cpu.fsdp.engine_cases import FsdpLayout, make_fsdp_engine
from tests.cpu.megatron.engine_cases import Layout, make_engine
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

DISTRIBUTED = Layout(dp=2, distributed_optimizer=True)


@pytest.mark.parametrize("bucket_size", [1, 1 << 20])
def test_every_server_receives_all_weights(bucket_size):
    *trainers, first, second = run_on_ranks(transfer, TRAINERS + 2, bucket_size)
    assert trainers == [True] * TRAINERS
    for received in (first, second):
        for factor, update in zip((1, 2), received, strict=True):
            assert list(update) == list(WEIGHTS)
            for name, tensor in WEIGHTS.items():
                assert update[name].dtype == torch.float32
                assert torch.equal(update[name], (factor * tensor).float())


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (functools.partial(make_engine, optimizer="adam", lr=1e-2), DISTRIBUTED),
        (make_fsdp_engine, FsdpLayout("fsdp", 2)),
        (make_fsdp_engine, FsdpLayout("fsdp2", 2)),
    ],
    ids=["megatron", "fsdp", "fsdp2"],
)
def test_a_saved_model_does_not_follow_the_one_that_trains(make, layout, tiny_qwen2):
    ranks = run_on_ranks(step_and_go_back, 2, make, layout, tiny_qwen2, preload=ENGINE_MODULES)
    for moved, left in ranks:
        assert moved > 1e-3 and left == 0


def test_replay_buffers_look_often_unless_told():
    class Buffer:
        def __init__(self, poll_interval: float = 2.0):
            self.poll_interval = poll_interval

    class Module:
        ReplayBuffer = Buffer

    patch(Module)
    assert (Buffer().poll_interval, Buffer(poll_interval=1.0).poll_interval) == (POLL_SECONDS, 1.0)
