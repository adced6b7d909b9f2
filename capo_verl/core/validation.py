# SPDX-License-Identifier: Apache-2.0
"""Checks of the filter's input: one clear error, before anything is updated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.config.checks import is_number
from capo_verl.core.logits import FLOATS, ProjectedLogits, VocabShard, describe

LOGITS = "logits are not finite"
TOO_LARGE = "advantages, hidden_states or learning_rate are too large: their products overflow"
TOKEN_PROBLEMS = (
    LOGITS,
    "hidden_states are not finite",
    "advantages are not finite",
    "actions are not token ids",
    "sequence_ids are out of range",
    "there are more response tokens than max_tokens",
    "temperature is not a finite number > 0",
    "response_mask is neither 0 nor 1",
    TOO_LARGE,
)
"""The problems that values of a token can have."""
LEARNING_RATE_MAX = 1e18
"""Its square is a float32."""

_SHOWN = 5


def is_count(x: Any, least: int = 0) -> bool:
    """True for an integer in ``least..2^53``, which a float64 counts exactly; not for bool."""
    return isinstance(x, Integral) and not isinstance(x, bool) and least <= int(x) <= 1 << 53


def shown(x: Any) -> str:
    """A value as an error shows it, however large it is."""
    if isinstance(x, Tensor):
        return describe(x)
    try:
        text = " ".join(repr(x).split())
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = f"a huge {type(x).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def version(x: Tensor) -> int:
    """Version of the tensor's storage, as autograd counts it; inference tensors have none."""
    return 0 if x.is_inference() else x._version


def check_unmodified(hidden: Tensor, since: int) -> None:
    """
    Raises:
        RuntimeError: if hidden states were written to since they had the version ``since``.
    """
    if version(hidden) != since:
        raise RuntimeError(
            "hidden_states were modified in place between CapoFilter.evaluate() and step(); "
            "they are needed for the moments until then: pass a copy to evaluate()"
        )


class Inputs(NamedTuple):
    """The arguments of ``CapoFilter.evaluate``, checked and flattened to the N tokens to
    evaluate.
    """

    hidden: Tensor
    """``[N, H]``, the caller's if N = M."""
    logits: Tensor | ProjectedLogits
    """``[M, rows]``, all positions: they are too large to copy."""
    positions: Tensor | None
    """``[N]`` int64, position of each token among the M, -1 where there is none to fill the place;
    None if N = M.
    """
    temperature: Tensor | None
    """``[N]``, by which the logits still have to be divided, in the dtype in which they are; this
    and what follows are copies.
    """
    actions: Tensor
    """``[N]`` int64"""
    advantages: Tensor
    """``[N]`` in the compute dtype: float64 if the model's tensors are, else float32."""
    mask: Tensor
    """``[N]`` bool"""
    odd: Tensor | None
    """``[N]`` bool, what was given as the mask is neither 0 nor 1; None if it was bool."""
    sequence: Tensor
    """``[N]`` int64"""
    num_sequences: int
    learning_rate: float
    shape: torch.Size
    """Shape of ``actions``, M elements."""
    overflow: Tensor | None
    """Scalar bool, the mask holds more tokens than ``max_tokens``; None without that."""

    def part(self, tokens: slice) -> Inputs:
        """The inputs of some of the N tokens; nothing is copied. Logits are read elsewhere."""
        return self._replace(
            hidden=self.hidden[tokens],
            positions=None if self.positions is None else self.positions[tokens],
            temperature=None if self.temperature is None else self.temperature[tokens],
            actions=self.actions[tokens],
            advantages=self.advantages[tokens],
            mask=self.mask[tokens],
            odd=None,
            sequence=self.sequence[tokens],
        )

    def restore(self, x: Tensor) -> Tensor:
        """``[N]`` to the shape of ``actions``; zero at positions that were not evaluated."""
        if self.positions is not None:
            m = self.shape.numel()
            at = torch.where(self.positions < 0, m, self.positions)
            x = x.new_zeros(m + 1).index_copy_(0, at, x)[:m]
        else:
            x = x.clone()  # who is given it may write to it
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
    dtype: torch.dtype,
) -> Inputs:
    """Check everything that needs no look at the values. See ``CapoFilter.evaluate`` for shapes.

    Args:
        dtype: of the arithmetic, if the tensors are not wider.

    Raises:
        ValueError: naming the argument, what was found and what is expected.
    """
    given = {
        "hidden_states": hidden_states,
        "actions": actions,
        "logits": logits.weight if isinstance(logits, ProjectedLogits) else logits,
        "advantages": advantages,
        "response_mask": response_mask,
    }
    optional = {"temperature": temperature, "sequence_ids": sequence_ids}
    _check_tensors({**given, **{name: x for name, x in optional.items() if x is not None}})
    shape = actions.shape
    if not _is_integer(actions) or not shape:
        raise ValueError(
            "actions: expected integer token ids with at least one dimension, got "
            f"{describe(actions)}"
        )
    if isinstance(logits, ProjectedLogits):
        logits.check(shard.rows, hidden_size)
    _check_shapes(shape, hidden_states, logits, advantages, hidden_size, shard)
    for name, x in (("response_mask", response_mask), ("temperature", temperature)):
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} like actions, got {describe(x)}"
            )
    if not is_number(learning_rate) or not 0 <= learning_rate <= LEARNING_RATE_MAX:
        large = is_number(learning_rate) and learning_rate > 0
        allowed = f"<= {LEARNING_RATE_MAX:g}" if large else ">= 0"
        raise ValueError(
            f"learning_rate: expected a finite float {allowed}, got {shown(learning_rate)}"
        )
    if max_tokens is not None and not is_count(max_tokens):
        raise ValueError(f"max_tokens: expected an integer >= 0, or None, got {shown(max_tokens)}")
    if (sequence_ids is None) != (num_sequences is None):
        raise ValueError("sequence_ids and num_sequences must be given together")
    if sequence_ids is None:
        num_sequences = math.prod(shape[:-1])
        sequence_ids = torch.arange(num_sequences, device=actions.device).repeat_interleave(
            shape[-1]
        )
    elif sequence_ids.shape != shape or not _is_integer(sequence_ids):
        raise ValueError(
            f"sequence_ids: expected integers of shape {list(shape)}, got {describe(sequence_ids)}"
        )
    elif not is_count(num_sequences, least=min(1, actions.numel())):
        raise ValueError(f"num_sequences: expected an integer >= 1, got {shown(num_sequences)}")
    m = actions.numel()
    mask = response_mask.reshape(m).bool()
    positions = _positions(mask, max_tokens) if skip_masked else None
    if torch.float64 in (hidden_states.dtype, logits.dtype):
        dtype = torch.float64

    def tokens(x: Tensor) -> Tensor:
        return x if positions is None else x[positions]

    def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy of a small tensor that is read after this call."""
        return tokens(x.detach().reshape(m)).to(dtype, copy=True)

    odd = None
    if response_mask.dtype != torch.bool:
        values = tokens(response_mask.detach().reshape(m))
        odd = (values != 0) & (values != 1)
    hidden = tokens(hidden_states.detach().reshape(m, hidden_size))
    if hidden.is_inference() and positions is None:
        hidden = hidden.clone()  # torch does not count what is written to it
    return Inputs(
        hidden=hidden,
        logits=logits
        if isinstance(logits, ProjectedLogits)
        else logits.detach().reshape(m, shard.rows),
        positions=positions,
        temperature=None if temperature is None else copied(temperature, division_dtype(logits)),
        actions=copied(actions, torch.int64),
        advantages=copied(advantages.expand(shape), dtype),
        odd=odd,
        mask=mask.clone() if positions is None else mask[positions] & (positions >= 0),
        sequence=copied(sequence_ids, torch.int64),
        num_sequences=int(num_sequences or 0),
        learning_rate=float(learning_rate),
        shape=shape,
        overflow=mask.sum() > max_tokens if skip_masked and max_tokens is not None else None,
    )


def division_dtype(logits: Tensor | ProjectedLogits) -> torch.dtype:
    """The dtype in which the trainer divides by the temperature.

    That of the logits, if there are any; a fused cross-entropy divides what it has summed up in
    float32.
    """
    if isinstance(logits, ProjectedLogits):
        return torch.promote_types(logits.dtype, torch.float32)
    return logits.dtype


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    """Kind, device and dtype of each, before more is asked of them."""
    device = getattr(tensors["hidden_states"], "device", None)
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {shown(x)}")
        if x.device != device:
            raise ValueError(
                f"{name}: is on {x.device}, hidden_states are on {device}: move them to the same "
                "device"
            )
        # Of these two, _check_shapes names the only dtypes.
        small = name not in ("hidden_states", "logits")
        if small and x.dtype not in FLOATS and (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{name}: expected float16 to float64 or integers, got {describe(x)}")


def _check_shapes(
    shape: torch.Size,
    hidden_states: Tensor,
    logits: Tensor | ProjectedLogits,
    advantages: Tensor,
    hidden_size: int,
    shard: VocabShard,
) -> None:
    """Names of inputs that have other dimensions than ``actions``."""
    floats = [("hidden_states", hidden_states, hidden_size, "H")]
    if isinstance(logits, Tensor):
        floats.append(("logits", logits, shard.rows, "the vocabulary rows of this rank"))
    for name, tensor, last, what in floats:
        if tensor.shape != (*shape, last) or tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name}: expected a float tensor {[*shape, last]} (shape of actions, then "
                f"{what}), got {describe(tensor)}"
            )
    if advantages.dim() not in (0, len(shape)) or any(
        a not in (1, n) for a, n in zip(advantages.shape, shape, strict=False)
    ):
        raise ValueError(
            f"advantages: expected shape {list(shape)} like actions, or 1 in place of a dimension "
            f"(one per sequence: {[*shape[:-1], 1]}), got {describe(advantages)}"
        )


def _positions(mask: Tensor, max_tokens: int | None) -> Tensor:
    """Indices at which the mask is set.

    Their number is not known without waiting for a GPU, so there as many places as there may be.
    """
    if max_tokens is None and mask.device.type == "cpu":
        return mask.nonzero()[:, 0]
    # At least one place: without any, nobody would learn of a token that has none.
    size = len(mask) if max_tokens is None else min(max(1, max_tokens), len(mask))
    return torch.nonzero_static(mask, size=size, fill_value=-1)[:, 0]


def find_problems(
    inputs: Inputs, finite_logits: Tensor, shard: VocabShard, limit: float
) -> dict[str, Tensor]:
    """Problems of the values inside the mask: one of ``TOKEN_PROBLEMS`` -> ``[N]`` bool.
    Does not wait for the device.

    Args:
        finite_logits: ``[N]`` bool, of the support.
        limit: of a gradient whose square can be remembered.
    """
    none = torch.zeros_like(inputs.mask)
    finite, warm, largest = ~none, ~none, torch.zeros_like(inputs.advantages)
    if len(none):
        high, low = inputs.hidden.amax(-1), inputs.hidden.amin(-1)
        finite = high.isfinite() & low.isfinite()
        largest = torch.maximum(high, -low).to(largest.dtype)
    if inputs.temperature is not None:
        warm = inputs.temperature.isfinite() & (inputs.temperature > 0)
    known = inputs.advantages.isfinite()
    # Either factor is squared by itself as well.
    product = inputs.advantages.abs().clamp(min=1) * largest.clamp(min=1)
    bad = (
        warm & ~finite_logits,
        ~finite,
        ~known,
        (inputs.actions < 0) | (inputs.actions >= shard.vocab_size),
        (inputs.sequence < 0) | (inputs.sequence >= inputs.num_sequences),
        none if inputs.overflow is None else inputs.overflow.expand_as(none),
        ~warm,
        none if inputs.odd is None else inputs.odd,
        finite & known & (product > limit),
    )
    return {
        what: of_tokens & inputs.mask for what, of_tokens in zip(TOKEN_PROBLEMS, bad, strict=True)
    }


def note_overflow(problems: dict[str, Tensor], mask: Tensor, shifts: list[Tensor]) -> None:
    """Add the tokens of ``mask [N]`` whose ``shifts`` are not finite, ``[N]`` each, to
    ``problems``.

    Only if there is no other problem, which would explain them. Does not wait for the device.
    """
    known = torch.stack(list(problems.values())).any()
    overflows = ~torch.stack(shifts).isfinite().all(0)
    problems[TOO_LARGE] = problems[TOO_LARGE] | (overflows & mask & ~known)


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
            places = ", ".join(str(_position(i, inputs.shape)) for i in at[:_SHOWN])
            more = ", …" if len(at) > _SHOWN else ""
            values, advice = allowed.get(what, ""), ""
            logits = inputs.logits if what == LOGITS else None
            if isinstance(logits, Tensor) and logits[at].isneginf().any():
                advice = " (mask tokens by a finite floor such as -1e4 in place of -inf)"
            found.append(
                f"{what}{values} at {len(at)} of {total} response tokens: position {places}{more}"
                f"{advice}"
            )
    raise ValueError("; ".join(found))


def _position(index: int, shape: torch.Size) -> tuple[int, ...] | int:
    at: list[int] = []
    for n in reversed(shape):
        index, rest = divmod(index, n)
        at.append(rest)
    return tuple(reversed(at)) if len(at) > 1 else at[0]


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
