# SPDX-License-Identifier: Apache-2.0
"""Checks of the filter's input: one clear error, before anything is updated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.core.logits import ProjectedLogits, VocabShard

TOKEN_PROBLEMS = (
    "logits are not finite",
    "hidden_states are not finite",
    "advantages are not finite",
    "actions are not token ids",
    "sequence_ids are out of range",
    "there are more response tokens than max_tokens",
)
"""The problems that values of a token can have."""

_SHOWN = 5


class Inputs(NamedTuple):
    """The arguments of ``CapoFilter.evaluate``, checked and flattened to the N tokens to
    evaluate.
    """

    hidden: Tensor
    """``[N, H]``"""
    logits: Tensor | ProjectedLogits
    """``[M, rows]``, all positions: they are too large to copy."""
    positions: Tensor | None
    """``[N]`` int64, position of each token among the M, -1 where there is none to fill the place;
    None if N = M.
    """
    temperature: Tensor | None
    """``[N]``, by which the logits still have to be divided."""
    actions: Tensor
    """``[N]`` int64"""
    advantages: Tensor
    """``[N]``"""
    mask: Tensor
    """``[N]`` bool"""
    sequence: Tensor
    """``[N]`` int64"""
    num_sequences: int
    learning_rate: float
    shape: torch.Size
    """Shape of ``actions``, M elements."""
    overflow: Tensor | None
    """Scalar bool, the mask holds more tokens than there are places; None if there is a place for
    all.
    """

    @property
    def dtype(self) -> torch.dtype:
        """float64 if the model's tensors are, else float32."""
        wide = torch.float64 in (self.hidden.dtype, self.logits.dtype)
        return torch.float64 if wide else torch.float32

    def part(self, tokens: slice) -> Inputs:
        """The inputs of some of the N tokens; nothing is copied. Logits are read elsewhere."""
        return self._replace(
            hidden=self.hidden[tokens],
            positions=None if self.positions is None else self.positions[tokens],
            temperature=None if self.temperature is None else self.temperature[tokens],
            actions=self.actions[tokens],
            advantages=self.advantages[tokens],
            mask=self.mask[tokens],
            sequence=self.sequence[tokens],
        )

    def restore(self, x: Tensor) -> Tensor:
        """``[N]`` to the shape of ``actions``; zero at positions that were not evaluated."""
        if self.positions is not None:
            m = self.shape.numel()
            at = torch.where(self.positions < 0, m, self.positions)
            x = x.new_zeros(m + 1).index_copy_(0, at, x)[:m]
        return x.view(self.shape)


def check_inputs(
    hidden_states: Tensor,
    logits: Tensor | ProjectedLogits,
    actions: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    learning_rate: float,
    *,
    temperature: Tensor | None,
    skip_masked: bool,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
    max_tokens: int | None,
    hidden_size: int,
    shard: VocabShard,
) -> Inputs:
    """Check everything that needs no look at the values. See ``CapoFilter.evaluate`` for shapes.

    Raises:
        ValueError: naming the argument, what was found and what is expected.
    """
    shape = actions.shape
    if actions.is_floating_point() or actions.dtype == torch.bool or not shape:
        raise ValueError(
            "actions: expected integer token ids with at least one dimension, got "
            f"{_describe(actions)}"
        )
    tensors = [("hidden_states", hidden_states, hidden_size)]
    if isinstance(logits, ProjectedLogits):
        logits.check(shard.rows, hidden_size)
    else:
        tensors.append(("logits", logits, shard.rows))
    for name, tensor, last in tensors:
        if tensor.shape != (*shape, last) or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected a float tensor {[*shape, last]} (shape of actions, then "
                f"{'H' if name == 'hidden_states' else 'the vocabulary rows of this rank'}), got "
                f"{_describe(tensor)}"
            )
    if response_mask.shape != shape:
        raise ValueError(
            f"response_mask: expected shape {list(shape)} like actions, got "
            f"{_describe(response_mask)}"
        )
    if advantages.dim() not in (0, len(shape)) or any(
        a not in (1, n) for a, n in zip(advantages.shape, shape, strict=False)
    ):
        raise ValueError(
            f"advantages: expected shape {list(shape)} like actions, or 1 in place of a dimension "
            f"(one per sequence: {[*shape[:-1], 1]}), got {_describe(advantages)}"
        )
    if isinstance(learning_rate, Tensor) or not (
        math.isfinite(learning_rate) and learning_rate >= 0
    ):
        raise ValueError(f"learning_rate: expected a finite float >= 0, got {learning_rate!r}")
    if (sequence_ids is None) != (num_sequences is None):
        raise ValueError("sequence_ids and num_sequences must be given together")
    if sequence_ids is None:
        num_sequences = math.prod(shape[:-1])
        sequence_ids = torch.arange(num_sequences, device=actions.device).repeat_interleave(
            shape[-1]
        )
    elif sequence_ids.shape != shape or sequence_ids.is_floating_point():
        raise ValueError(
            f"sequence_ids: expected integers of shape {list(shape)}, got {_describe(sequence_ids)}"
        )
    if temperature is not None and temperature.shape != shape:
        raise ValueError(
            f"temperature: expected shape {list(shape)} like actions, got {_describe(temperature)}"
        )
    assert num_sequences is not None
    m = actions.numel()
    mask = response_mask.reshape(m).bool()
    positions = _positions(mask, max_tokens) if skip_masked else None

    def tokens(x: Tensor) -> Tensor:
        return x if positions is None else x[positions]

    return Inputs(
        hidden=tokens(hidden_states.detach().reshape(m, hidden_size)),
        logits=logits
        if isinstance(logits, ProjectedLogits)
        else logits.detach().reshape(m, shard.rows),
        positions=positions,
        temperature=None if temperature is None else tokens(temperature.reshape(m)),
        actions=tokens(actions.reshape(m)).long(),
        advantages=tokens(advantages.detach().expand(shape).reshape(m)),
        mask=mask if positions is None else mask[positions] & (positions >= 0),
        sequence=tokens(sequence_ids.reshape(m)).long(),
        num_sequences=num_sequences,
        learning_rate=float(learning_rate),
        shape=shape,
        overflow=None if positions is None else mask.sum() > len(positions),
    )


def _positions(mask: Tensor, max_tokens: int | None) -> Tensor:
    """Indices at which the mask is set.

    Their number is not known without waiting for a GPU, so there as many places as there may be.
    """
    if max_tokens is None and mask.device.type == "cpu":
        return mask.nonzero()[:, 0]
    size = len(mask) if max_tokens is None else min(max_tokens, len(mask))
    return torch.nonzero_static(mask, size=size, fill_value=-1)[:, 0]


def find_problems(inputs: Inputs, finite_logits: Tensor, shard: VocabShard) -> dict[str, Tensor]:
    """Problems of the values inside the mask: one of ``TOKEN_PROBLEMS`` -> ``[N]`` bool.
    Does not wait for the device.

    Args:
        finite_logits: ``[N]`` bool, of the support.
    """
    if len(inputs.mask):
        finite = inputs.hidden.amin(-1).isfinite() & inputs.hidden.amax(-1).isfinite()
    else:
        finite = torch.ones_like(inputs.mask)
    bad = (
        ~finite_logits,
        ~finite,
        ~inputs.advantages.isfinite(),
        (inputs.actions < 0) | (inputs.actions >= shard.vocab_size),
        (inputs.sequence < 0) | (inputs.sequence >= inputs.num_sequences),
        torch.zeros_like(inputs.mask)
        if inputs.overflow is None
        else inputs.overflow.expand_as(inputs.mask),
    )
    return {
        what: of_tokens & inputs.mask for what, of_tokens in zip(TOKEN_PROBLEMS, bad, strict=True)
    }


def raise_for(problems: dict[str, Tensor], inputs: Inputs, shard: VocabShard) -> None:
    """Check all problems with one synchronisation with the device.

    Raises:
        ValueError: if there is any: what, how many, where.
    """
    if not torch.stack(list(problems.values())).any():
        return
    total = int(inputs.mask.sum())
    allowed = {
        "actions are not token ids": f" (0..{shard.vocab_size - 1})",
        "sequence_ids are out of range": f" (0..{inputs.num_sequences - 1})",
    }
    found = []
    for what, bad in problems.items():
        index = bad.nonzero()[:, 0]
        at = (index if inputs.positions is None else inputs.positions[index]).tolist()
        if at:
            shown = ", ".join(str(_position(i, inputs.shape)) for i in at[:_SHOWN])
            more = ", …" if len(at) > _SHOWN else ""
            values = allowed.get(what, "")
            found.append(
                f"{what}{values} at {len(at)} of {total} response tokens: position {shown}{more}"
            )
    raise ValueError("; ".join(found))


def _position(index: int, shape: torch.Size) -> tuple[int, ...] | int:
    at: list[int] = []
    for n in reversed(shape):
        index, rest = divmod(index, n)
        at.append(rest)
    return tuple(reversed(at)) if len(at) > 1 else at[0]


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
