# SPDX-License-Identifier: Apache-2.0
"""Prompt lengths in tokens, as verl counts them, against ``data.max_prompt_length``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from capo_verl.data.rows import Row


@dataclass(frozen=True)
class Lengths:
    """Lengths of the prompts of one file, in tokens."""

    median: int
    p99: int
    longest: int
    too_long: int
    """Prompts above the limit: verl leaves them out (``data.filter_overlong_prompts``) or stops."""


def load_tokenizer(path: str, option: str = "--tokenizer") -> Any:
    """A tokenizer from a folder or the hub.

    Raises:
        ValueError: if there is no tokenizer that can be loaded, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many kinds, for the files may hold anything
        first, *_ = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {first}"
        raise ValueError(f"{option} {path}: its tokenizer cannot be loaded ({reason})") from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{option} {path}: it has no chat template, so a prompt's length cannot be told"
        )
    return tokenizer


def measure(rows: Iterable[Row], tokenizer: Any, limit: int) -> Lengths:
    """Lengths with the chat template and the generation prompt, as verl measures them."""
    texts = (
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in rows
    )
    counts = sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    last = len(counts) - 1
    return Lengths(
        counts[last // 2],
        counts[round(0.99 * last)],
        counts[-1],
        sum(count > limit for count in counts),
    )
