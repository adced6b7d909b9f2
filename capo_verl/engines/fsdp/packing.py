# SPDX-License-Identifier: Apache-2.0
"""The layout in which the FSDP engine has the logits, from verl's response-only fields.

verl's batches hold prompts and responses of different lengths without padding. The model sees one
packed row, perhaps padded at its end and cut over the ranks of Ulysses sequence parallelism, or
padded rows. The logits of a position are those of the token after it, so our fields move by one,
and never from one sequence into the one before it.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.ulysses import ulysses_pad_and_slice_inputs

from capo_verl.engines.response import PackedResponse, next_token_fields


def packed_response(engine: Any, batch: TensorDict) -> PackedResponse:
    """Advantages and response mask ``[1, total]`` (of this Ulysses rank), laid out like
    ``input_ids_rmpad_rolled``.
    """
    # Here and not above: loading verl's engines loads ours, which imports this module.
    from verl.workers.engine.utils import pad_packed_inputs

    fields = next_token_fields(batch).T
    fields, _ = pad_packed_inputs(fields, None, engine._get_packed_pad_size(fields.shape[1]))
    if engine.use_ulysses_sp:
        fields, _, _ = ulysses_pad_and_slice_inputs(
            fields, None, engine.ulysses_sequence_parallel_size
        )
    return PackedResponse.of(fields[:, None], batch)


def padded_response(batch: TensorDict, length: int) -> PackedResponse:
    """Advantages and response mask ``[b, length]``."""
    return PackedResponse.of(
        to_padded(next_token_fields(batch), batch, length).movedim(-1, 0), batch
    )


def to_padded(values: Tensor, batch: TensorDict, length: int) -> Tensor:
    """``[total, ...]``, one entry per token of ``input_ids``, to ``[b, length, ...]`` with zeros on
    the right.
    """
    nested = torch.nested.nested_tensor_from_jagged(values, offsets=batch["input_ids"].offsets())
    return torch.nested.to_padded_tensor(
        nested, 0, output_size=(len(batch), length, *values.shape[1:])
    )


def from_padded(values: Tensor, batch: TensorDict) -> Tensor:
    """``[b, length]`` to ``[total]``, without the padding on the right."""
    offsets, (b, length) = batch["input_ids"].offsets(), values.shape
    total = batch["input_ids"].values().shape[0]
    # Row i begins at i * length here and at offsets[i] there.
    shift = torch.arange(b, device=values.device) * length - offsets[:-1]
    at = torch.arange(total, device=values.device) + shift.repeat_interleave(
        offsets.diff(), output_size=total
    )
    return values.flatten()[at]
