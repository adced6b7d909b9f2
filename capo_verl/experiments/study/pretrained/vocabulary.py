# SPDX-License-Identifier: Apache-2.0
"""Text to tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol


class Vocabulary(Protocol):
    """Facts that a task needs to know of a model's tokens."""

    size: int
    end: int
    """Token after a response."""
    pad: int
    """Token before a prompt, which no text has."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def prompt(self, question: str) -> list[int]:
        """A question as the model's chat template asks it."""


class Bytes:
    """UTF-8, for tests."""

    size, end, pad = 258, 256, 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < self.end).decode(errors="replace")

    def prompt(self, question: str) -> list[int]:
        return self.encode(question + "?")


class SmolLM2:
    """The tokenizer beside the converted model.

    Args:
        folder: of :func:`capo_verl.cpu.smollm2.pretrained.prepare_model`.
    """

    size = 49152

    def __init__(self, folder: Path):
        from transformers import PreTrainedTokenizerFast

        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.end, self.pad = self.encode("<|im_end|>")[0], self.encode("<|endoftext|>")[0]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def prompt(self, question: str) -> list[int]:
        # Without the template's system message, which is longer than the questions.
        return self.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def model_folder() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face format, from the cache where possible."""
    from capo_verl.cpu.smollm2.pretrained import prepare_model

    return prepare_model(1)[0]


@lru_cache(maxsize=2)
def vocabulary(model: str) -> Vocabulary:
    """The tokens of a run's model."""
    return Bytes() if model == "random" else SmolLM2(model_folder())
