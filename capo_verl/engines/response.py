# SPDX-License-Identifier: Apache-2.0
"""verl's response-only fields on the tokens of whole sequences, and per-token results back on the
responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

SAMPLE = "capo_sample"
"""Key of the index of each sample in this rank's share of the mini-batch, ``[b]`` int64."""


PER_TOKEN = (
    "advantages", "old_log_probs", "ref_log_prob", "rollout_log_probs", "rollout_is_weights",
)  # fmt: skip
"""Fields of a mini-batch with a value for each response token, which a loss may read."""


class PackedResponse(NamedTuple):
    """Per-token fields in the layout of the labels, ``[b, s]`` or ``[1, total]``; zeros outside the
    responses.
    """

    advantages: Tensor
    response_mask: Tensor
    """bool"""
    sequence_ids: Tensor
    """int64, position of the sample in the micro-batch."""
    samples: Tensor
    """``[num_sequences]`` int64, index of each sample in this rank's share of the mini-batch."""
    max_tokens: int
    """At most so many tokens are in the response mask; known from shapes."""

    @property
    def num_sequences(self) -> int:
        return len(self.samples)

    @classmethod
    def of(cls, fields: Tensor, batch: TensorDict) -> PackedResponse:
        """Make it of the columns of :func:`next_token_fields`, ``[3, ...]``, laid out as the
        labels.

        Args:
            batch: the micro-batch they are of, with :data:`SAMPLE`.
        """
        advantages, mask, sequence = fields
        return cls(
            advantages.contiguous(),
            mask > 0.5,
            sequence.long(),
            batch[SAMPLE],
            max_response_tokens(batch),
        )


def masked_values(data: TensorDict, name: str) -> tuple[Tensor, Tensor]:
    """Values ``[R]`` of a response field at the tokens of the response mask (0 elsewhere), and the
    position in the micro-batch of the sample that each belongs to, ``[R]`` int64.

    Args:
        data: micro-batch; the field and ``response_mask`` nested, or padded to ``[b,
            max_response]``.
    """
    mask = data["response_mask"]
    return torch.where(_flat(mask).bool(), _flat(data[name]), 0.0), samples_of(mask)


def without_other_voices(data: TensorDict) -> TensorDict:
    """A copy of a mini-batch in which what is said of a tool's tokens is 0, whatever it was; the
    original keeps its own.

    verl's losses multiply by the response mask, and NaN times 0 is NaN: in the loss, or in the
    gradient of a ratio that is not finite.

    Args:
        data: with ``response_mask``, and any of :data:`PER_TOKEN`, all nested, or all padded.
    """
    kept, mask = data.select(*data.keys()), data["response_mask"]
    own = _flat(mask).bool()
    for name in PER_TOKEN:
        field = data.get(name, None)
        if field is None:
            continue
        values = torch.where(own, _flat(field), 0)
        kept[name] = torch.zeros_like(field)  # of the same lengths, which verl pads by
        (kept[name].values() if field.is_nested else kept[name].view(-1)).copy_(values)
    return kept


def samples_of(field: Tensor) -> Tensor:
    """The position in the micro-batch of the sample that each value of a response field belongs
    to, ``[R]`` int64.
    """
    if not field.is_nested:
        return torch.arange(len(field), device=field.device).repeat_interleave(field.shape[1])
    lengths = _offsets(field).diff()
    sample = torch.arange(len(lengths), device=lengths.device)
    return sample.repeat_interleave(lengths, output_size=field.values().shape[0])


def choose_tokens(mask: Tensor, samples: Sequence[int], limit: int) -> Tensor:
    """The tokens of a response mask that belong to some samples, at most ``limit``, evenly spread;
    bool, nested or padded like the mask.
    """
    chosen = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    chosen[torch.as_tensor(samples, dtype=torch.int64)] = True
    flat = _flat(mask).bool()
    at = (flat & chosen[samples_of(mask)]).nonzero()[:, 0]
    if len(at) > limit:
        at = at[torch.arange(limit, device=at.device) * len(at) // limit]
    kept = torch.zeros_like(flat).index_fill_(0, at, True)
    if mask.is_nested:
        return torch.nested.nested_tensor_from_jagged(kept, offsets=_offsets(mask))
    return kept.view_as(mask)


def response_fields(batch: TensorDict) -> Tensor:
    """Advantage, response mask and index of the sample for every token of ``input_ids``: nested
    ``[b, j, 3]``, float32.

    Args:
        batch: micro-batch with nested ``input_ids``; ``advantages`` and ``response_mask`` nested,
            or padded to ``[b, max_response]`` with ``prompts`` and ``attention_mask``.
    """
    offsets = batch["input_ids"].offsets()
    b, total = len(offsets) - 1, batch["input_ids"].values().shape[0]
    at = _response_positions(batch, offsets, total)
    fields = torch.zeros(total + 1, 3, device=offsets.device, dtype=torch.float32)
    for column, name in enumerate(("advantages", "response_mask")):
        fields[:, column].index_copy_(0, at, _flat(batch[name]).to(fields.dtype))
    fields = fields[:total]
    # Sample indices are exact in float32 up to 16 million.
    fields[:, 2] = torch.arange(b, device=offsets.device).repeat_interleave(
        offsets.diff(), output_size=total
    )
    return torch.nested.nested_tensor_from_jagged(fields, offsets=offsets)


def next_token_fields(batch: TensorDict) -> Tensor:
    """Advantage and response mask of the token after each token, 0 at the end of a sequence; its
    own sample. ``[total, 3]``
    """
    fields, ends = response_fields(batch).values(), batch["input_ids"].offsets()[1:] - 1
    following = fields.roll(-1, 0)
    following.index_fill_(0, ends, 0)
    following[:, 2] = fields[:, 2]
    return following


def accepted_response(accepted: Tensor, data: TensorDict) -> Tensor:
    """Per-token results of the whole sequences, cut to the responses in the format of
    ``data["response_mask"]``.

    Args:
        accepted: nested ``[b, prompt + response]``, as verl's engine returns per-token results: at
            the position before the token's. (verl's own functions for this wait for the device once
            per sequence.)
    """
    response_mask, values = data["response_mask"], accepted.values()
    at = _response_positions(data, _offsets(accepted), len(values))
    # Moved to its token, with a 0 for padding; what the very last position says is about no token.
    values = torch.nn.functional.pad(values[:-1], (1, 1))[at]
    if response_mask.is_nested:
        return torch.nested.nested_tensor_from_jagged(values, offsets=response_mask.offsets())
    return values.view_as(response_mask)


def weigh_advantages(data: TensorDict, weights: Tensor) -> TensorDict:
    """A copy of the micro-batch with ``weights * advantages``, the response mask as it is; the
    original keeps its own.

    The losses of tokens are positively homogeneous in the advantage, so this weighs the token's
    loss; of verl's, ``clip_cov`` and ``kl_cov`` choose tokens by their advantage, and ``dro`` and
    ``kl_cov`` add terms without one: docs/algorithm.md.

    Args:
        weights: from :func:`accepted_response`.
    """
    weighed, advantages = data.select(*data.keys()), data["advantages"]
    if advantages.is_nested:
        weighed["advantages"] = torch.zeros_like(
            advantages
        )  # of the same lengths, which verl pads by
        weighed["advantages"].values().copy_(advantages.values() * weights.values())
    else:
        weighed["advantages"] = advantages * weights.to(advantages.dtype)
    return weighed


def mask_rejected(data: TensorDict, accepted: Tensor) -> TensorDict:
    """A copy of the micro-batch whose response mask holds the accepted tokens only; the original
    keeps its own.
    """
    mask = data["response_mask"]
    kept = data.select(*data.keys())
    if mask.is_nested:
        kept["response_mask"] = torch.zeros_like(mask)  # of the same lengths, which verl pads by
        kept["response_mask"].values().copy_(mask.values() * (accepted.values() > 0.5))
    else:
        kept["response_mask"] = mask * (accepted > 0.5)
    return kept


def max_response_tokens(batch: TensorDict) -> int:
    """Tokens of a micro-batch's responses, and their padding if there is any, from shapes alone."""
    return _flat(batch["response_mask"]).shape[0]


def _offsets(nested: Any) -> Tensor:
    """``[b + 1]`` int64; torch declares them on no class that a checker knows."""
    offsets: Tensor = nested.offsets()
    return offsets


def _flat(field: Tensor) -> Tensor:
    """``[R]``, of a nested or padded field."""
    return field.values() if field.is_nested else field.flatten()


def _response_positions(batch: TensorDict, offsets: Tensor, total: int) -> Tensor:
    """Position of each response value among the flat tokens: ``[R]`` int64, ``total`` for padding.

    Args:
        offsets: ``[b + 1]`` int64, of the sequences; total: number of their tokens.
    """
    response_mask, ends = batch["response_mask"], offsets[1:]
    if response_mask.is_nested:
        starts, lengths = response_mask.offsets()[:-1], response_mask.offsets().diff()
        count = response_mask.values().shape[0]
        # A sequence is prompt + response, so its response begins `length` before its end.
        shift = (ends - lengths - starts).repeat_interleave(lengths, output_size=count)
        return torch.arange(count, device=offsets.device) + shift
    first = batch["prompts"].shape[1]
    valid = batch["attention_mask"][:, first : first + response_mask.shape[1]].bool()
    order = valid.cumsum(-1)
    return torch.where(valid, (ends - order[:, -1])[:, None] + order - 1, total).flatten()
