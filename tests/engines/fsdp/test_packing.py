# SPDX-License-Identifier: Apache-2.0
"""Between flat tokens and padded rows, without waiting for the device."""

from __future__ import annotations

import torch
import verl  # noqa: F401  plugins first
from tensordict import TensorDict

from capo_verl.engines.fsdp.packing import from_padded, padded_response, to_padded
from capo_verl.engines.response import SAMPLE
from tests.helpers.syncs import recorded_syncs


def jagged(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


BATCH = TensorDict(
    {
        "input_ids": jagged([5, 6, 7], [4, 5, 6, 7], [8, 9]),
        "advantages": jagged([1.5], [-2.0, -2.0], [3.0]),
        "response_mask": jagged([1], [0, 1], [1]),
        SAMPLE: torch.tensor([3, 1, 2]),
    },
    batch_size=[3],
)


def test_padded_and_back():
    values = torch.arange(1.0, 10.0)
    with recorded_syncs() as syncs:
        padded = to_padded(values, BATCH, 5)
        back = from_padded(padded, BATCH)
    assert syncs == []
    assert padded.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0], [8, 9, 0, 0, 0]]
    assert torch.equal(back, values)


def test_fields_stand_before_their_tokens_and_never_in_another_sequence():
    with recorded_syncs() as syncs:
        response = padded_response(BATCH, 5)
    assert syncs == []
    assert response.advantages.tolist() == [[0, 1.5, 0, 0, 0], [0, -2, -2, 0, 0], [3, 0, 0, 0, 0]]
    assert response.response_mask.tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert response.samples.tolist() == [3, 1, 2]
