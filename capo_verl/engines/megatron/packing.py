# SPDX-License-Identifier: Apache-2.0
"""The layout in which Megatron computes the logits, from and to verl's response-only fields.

verl's batches hold prompts and responses of different lengths without padding. The model sees
either one packed row (``thd``) or padded rows (``bshd``), of which a context-parallel rank holds a
slice. verl lays out its own tensors one sequence at a time, with lengths that the host knows; here
one index says which token sits where (``verl/models/mcore/util.py``, ``preprocess_thd_engine`` and
``preprocess_bshd_engine``), and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from torch import Tensor
from verl.models.mcore.util import _compute_fp8_thd_align_size

from capo_verl.core import collectives
from capo_verl.engines.response import PackedResponse, next_token_fields


def token_positions(
    batch: TensorDict,
    shape: torch.Size,
    data_format: str,
    use_fp8_padding: bool = False,
    cp_layout: str = "zigzag",
) -> Tensor:
    """The flat token of ``input_ids`` at each place of this rank: int64 of ``shape``.

    The number of tokens stands where there is none.

    Args:
        batch: micro-batch with nested ``input_ids``.
        shape: of the labels, ``[1, total]`` (``thd``) or ``[b, s]`` (``bshd``).
        data_format, use_fp8_padding, cp_layout: as verl's engine lays out the labels, see
            :func:`label_layout`.
    """
    offsets, total = batch["input_ids"].offsets(), batch["input_ids"].values().shape[0]
    lengths, cp, rank = (
        offsets.diff(),
        mpu.get_context_parallel_world_size(),
        mpu.get_context_parallel_rank(),
    )
    place = torch.arange(shape[1], device=offsets.device)
    if data_format == "bshd":
        sequence = torch.arange(shape[0], device=offsets.device)[:, None]
        position = _zigzag(place, shape[1] * cp, cp, rank)[None].expand(shape)
    else:
        align = (
            mpu.get_tensor_model_parallel_world_size()
            * cp
            * (2 if cp_layout == "zigzag" and cp > 1 else 1)
        )
        if use_fp8_padding:
            align = _compute_fp8_thd_align_size(align)[0]
        ends = ((lengths + align - 1) // align * align).cumsum(0)
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        if cp_layout == "contiguous":
            place = place + shape[1] * rank
            sequence = torch.searchsorted(starts[1:], place, right=True)
            position = (place - starts[sequence])[None]
        else:
            starts = starts // cp
            sequence = torch.searchsorted(starts[1:], place, right=True)
            # Whatever the row is padded to belongs to its last sequence.
            padded = torch.nn.functional.pad(starts[1:], (0, 1), value=shape[1]) - starts
            position = _zigzag(place - starts[sequence], padded[sequence] * cp, cp, rank)[None]
        sequence = sequence[None]
    return torch.where(position < lengths[sequence], offsets[sequence] + position, total)


def _zigzag(place: Tensor, padded: Any, cp: int, rank: int) -> Tensor:
    """Position in a sequence of ``padded`` tokens of a place in this rank's slice: a chunk from its
    front, one from its back.
    """
    if cp == 1:
        return place
    chunk = padded // (2 * cp)
    return torch.where(place < chunk, chunk * rank + place, padded - chunk * (rank + 2) + place)


def pack_response(batch: TensorDict, at: Tensor) -> PackedResponse:
    """Advantages and response mask where the labels of their tokens are: at the position before the
    token's own.

    Args:
        batch: micro-batch, see :func:`capo_verl.engines.response.response_fields`.
        at: from :func:`token_positions`.
    """
    fields = torch.nn.functional.pad(next_token_fields(batch), (0, 0, 0, 1))[at]
    return PackedResponse.of(fields.movedim(-1, 0), batch)


def unpack(values: Tensor, batch: TensorDict, at: Tensor) -> Tensor:
    """Per-token results of this context-parallel rank to those of all ranks, nested ``[b, j]`` like
    ``input_ids``.

    Args:
        values, at: of the same shape, ``at`` from :func:`token_positions`.
    """
    input_ids = batch["input_ids"]
    flat = values.new_zeros(input_ids.values().shape[0] + 1).index_copy_(
        0, at.flatten(), values.flatten()
    )
    collectives.sum_(flat, (mpu.get_context_parallel_group(),))
    return torch.nested.nested_tensor_from_jagged(flat[:-1], offsets=input_ids.offsets())


def label_layout(engine: Any, data_format: str, unwrapped_model: Any) -> dict[str, Any]:
    """The layout of the labels in verl's engine (``MegatronEngine.forward_step``)."""
    layout = {
        "data_format": data_format,
        "use_fp8_padding": unwrapped_model.config.fp8 in ("e4m3", "hybrid"),
    }
    if data_format == "thd":
        layout["cp_layout"] = engine._get_context_parallel_layout(unwrapped_model)
    return layout
