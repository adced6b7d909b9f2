# SPDX-License-Identifier: Apache-2.0
"""The logits of many tokens, read a run at a time: as a tensor, too large to copy whole, or as
hidden states and LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capo_verl.core.chunks import chunk_slices

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of hidden states, logits and moments; float8 has no arithmetic."""


def describe(x: Tensor) -> str:
    """Dtype and shape, as errors show them."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


@dataclass(frozen=True)
class VocabShard:
    """The rows of the LM head held by this rank: global ids ``start .. start + rows``.

    Rows with an id >= ``vocab_size`` exist only to make the vocabulary divisible; they are never in
    a support.
    """

    vocab_size: int
    rows: int
    start: int

    @property
    def real_rows(self) -> int:
        return min(max(self.vocab_size - self.start, 0), self.rows)


class LogitRows:
    """N of M rows of logits.

    Args:
        logits: ``[M, rows]``; never written to.
        positions: ``[N]`` int64, which of the M; None = all.
        temperature: ``[N]``, divides the logits in the wider dtype of both; None = already done.
    """

    def __init__(
        self, logits: Tensor, positions: Tensor | None = None, temperature: Tensor | None = None
    ):
        self.logits, self.positions, self.temperature = logits, positions, temperature
        self.device, self.dtype = logits.device, logits.dtype

    def __len__(self) -> int:
        return len(self.logits if self.positions is None else self.positions)

    def read(self, tokens: slice | Tensor, rows: int) -> Tensor:
        """``[n, rows]``: the first ``rows`` columns of the given tokens, before temperature."""
        return self.logits[tokens if self.positions is None else self.positions[tokens], :rows]

    def cool(self, values: Tensor, tokens: slice | Tensor) -> Tensor:
        """Logits ``[n, ...]`` of the given tokens, divided by the temperature.

        Division by a positive number keeps the order, so the largest may be searched before it.
        """
        if self.temperature is None:
            return values
        return values / self.temperature[tokens].view(-1, *[1] * (values.dim() - 1))

    def part(self, tokens: slice) -> LogitRows:
        """The rows of some tokens; nothing is copied."""
        temperature = None if self.temperature is None else self.temperature[tokens]
        if self.positions is None:
            return LogitRows(self.logits[tokens], None, temperature)
        return LogitRows(self.logits, self.positions[tokens], temperature)

    def blocks(self) -> Iterator[LogitRows]:
        """The same rows in parts, at least one, whose ``logits`` exist as a tensor: these are such
        a part.
        """
        yield self

    def copy(self) -> LogitRows:
        logits = self.read(slice(None), self.logits.shape[1]).clone()
        return LogitRows(logits, temperature=self.temperature)

    @staticmethod
    def concatenate(parts: Sequence[LogitRows]) -> LogitRows:
        """Copies of the rows of all parts, in order."""
        copies = [part.copy() for part in parts]
        logits = torch.cat([x.logits for x in copies])
        if all(x.temperature is None for x in copies):
            return LogitRows(logits)
        one = logits.new_ones(len(logits))
        temperatures = (one[: len(x)] if x.temperature is None else x.temperature for x in copies)
        return LogitRows(logits, temperature=torch.cat(list(temperatures)))


def block_elements(device: torch.device) -> int:
    """Logits that exist at a time: every run of tokens reads the whole LM head, so a few hundred
    tokens of a large vocabulary.
    """
    return 1 << 21 if device.type == "cpu" else 1 << 26


@dataclass(frozen=True)
class ProjectedLogits:
    """``logits = hidden_states @ weight.T + bias``, in place of a tensor of logits for
    ``CapoFilter.evaluate``. Only read.

    ``sequence`` and ``batch`` granularity and the batch shifts handle all tokens of a set at once;
    over the whole vocabulary (``top_k=None``) they do hold all logits.
    """

    weight: Tensor
    """``[rows, H]``, this rank's rows of the LM head.

    Its dtype is that of the logits; hidden states are converted to it.
    """
    bias: Tensor | None = None
    """``[rows]``"""

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def in_float32(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[N, rows]`` of ``hidden_states [N, H]`` in float32 (float64 if the LM head is),
        not rounded to its own dtype.

        Hidden states and weights are those which the LM head would multiply; their products are
        summed in float32. A run of vocabulary rows at a time, so that the LM head is never copied
        whole.
        """
        weight, dtype = self.weight, torch.promote_types(self.dtype, torch.float32)
        hidden = hidden_states.to(weight.dtype).to(dtype)
        logits = torch.empty(len(hidden), len(weight), device=weight.device, dtype=dtype)
        for rows in chunk_slices(
            len(weight), max(1, block_elements(weight.device) // weight.shape[1])
        ):
            bias = None if self.bias is None else self.bias[rows].to(dtype)
            logits[:, rows] = torch.nn.functional.linear(hidden, weight[rows].to(dtype), bias)
        return logits

    def check(self, rows: int, hidden_size: int) -> None:
        """
        Raises:
            ValueError: unless these are ``rows`` rows of an LM head for hidden states of this size.
        """
        for name, tensor, shape in (
            ("weight", self.weight, [rows, hidden_size]),
            ("bias", self.bias, [rows]),
        ):
            if tensor is not None and (list(tensor.shape) != shape or tensor.dtype not in FLOATS):
                raise ValueError(
                    f"logits: expected ProjectedLogits.{name} to be a float tensor {shape} (the "
                    f"vocabulary rows of this rank{', H' if name == 'weight' else ''}), got "
                    f"{describe(tensor)}"
                )


class ProjectedRows(LogitRows):
    """:class:`LogitRows` of hidden states, computed when they are read.

    Args:
        projection: the LM head.
        hidden_states: ``[N, H]``; neither they nor the LM head are copied.
        temperature: ``[N]``, divides the logits in the wider dtype of both; None = already done.
    """

    def __init__(
        self, projection: ProjectedLogits, hidden_states: Tensor, temperature: Tensor | None = None
    ):
        self._projection, self._hidden, self.temperature = projection, hidden_states, temperature
        self.device, self.dtype = hidden_states.device, projection.dtype

    def __len__(self) -> int:
        return len(self._hidden)

    def read(self, tokens: slice | Tensor, rows: int) -> Tensor:
        """``[n, rows]``: the first ``rows`` columns of the given tokens, before temperature."""
        weight, bias = self._projection.weight, self._projection.bias
        hidden = self._hidden[tokens].to(weight.dtype)
        return torch.nn.functional.linear(
            hidden, weight[:rows], None if bias is None else bias[:rows]
        )

    def part(self, tokens: slice) -> ProjectedRows:
        """The rows of some tokens; nothing is computed yet."""
        temperature = None if self.temperature is None else self.temperature[tokens]
        return ProjectedRows(self._projection, self._hidden[tokens], temperature)

    def blocks(self) -> Iterator[LogitRows]:
        """Blocks, one after the other, each with the logits of a run of tokens."""
        rows = len(self._projection.weight)
        runs = (
            chunk_slices(len(self), max(1, block_elements(self.device) // rows))
            if len(self)
            else [slice(0, 0)]
        )
        for tokens in runs:
            yield LogitRows(
                self.read(tokens, rows),
                temperature=None if self.temperature is None else self.temperature[tokens],
            )

    def copy(self) -> LogitRows:
        """The logits themselves: the LM head may not be there any more when they are read, as with
        FSDP.
        """
        logits = self.read(slice(None), len(self._projection.weight))
        return LogitRows(logits, temperature=self.temperature)
