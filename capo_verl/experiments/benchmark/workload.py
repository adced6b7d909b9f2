# SPDX-License-Identifier: Apache-2.0
"""Workloads: sizes of a model's LM head, dtypes of a device, and numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class LanguageModelHead(NamedTuple):
    """Sizes of the last layer."""

    vocab_size: int
    hidden_size: int


PRESETS = {
    "cpu-small": LanguageModelHead(32_768, 896),
    "qwen2.5-math-7b": LanguageModelHead(152_064, 3_584),
    "qwen2.5-32b": LanguageModelHead(152_064, 5_120),
}
DEFAULT_PRESETS = {"cpu": "cpu-small", "cuda": "qwen2.5-math-7b"}
DEFAULT_TOKENS = {
    "cpu": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "cuda": (1024, 2048, 4096, 8192, 16384, 24576, 32768, 65536),
}
MODEL_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""Dtype of hidden states and logits, and of everything in the naive formulation."""
MOMENT_BYTES = 4
"""CapoFilter's default, ``moments_dtype=float32``."""


@dataclass(frozen=True)
class Workload:
    """One run of the benchmark.

    Raises:
        ValueError: if the sizes do not fit each other.
    """

    name: str
    """The preset's, or the sizes if they are none of a preset."""
    vocab_size: int
    hidden_size: int
    tp: int
    """Tensor-parallel size.

    One rank is measured, with the k entries of every support on its ``rows``: an upper bound, for a
    real rank holds k / tp of them on average.
    """
    top_k: int
    tokens: tuple[int, ...]
    """Numbers of tokens, ascending."""
    device: str
    """``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        if self.top_k > self.rows:
            raise ValueError(
                f"--top-k {self.top_k} exceeds the {self.rows} vocabulary rows of one of {self.tp} "
                "tensor-parallel ranks"
            )

    @property
    def rows(self) -> int:
        """Vocabulary rows of one rank."""
        return -(-self.vocab_size // self.tp)

    @property
    def model_dtype(self) -> torch.dtype:
        return MODEL_DTYPES[self.device]

    @property
    def title(self) -> str:
        """Short, unique among the workloads of a machine."""
        return (
            f"{self.name}, TP {self.tp} (V={self.vocab_size:,}, H={self.hidden_size:,}, "
            f"k={self.top_k}, {str(self.model_dtype).removeprefix('torch.')})"
        )

    def input_bytes(self, tokens: int) -> int:
        """Logits and hidden states of a batch."""
        return tokens * (self.rows + self.hidden_size) * self.model_dtype.itemsize
