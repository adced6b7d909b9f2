# SPDX-License-Identifier: Apache-2.0
"""Contents of a row of verl's schema, as verl's trainer and this package's rewards need them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from capo_verl.data.rewards.extraction import ANSWER_FORMATS
from capo_verl.data.values import is_text, plain, short

ROLES = ("system", "user", "assistant")
"""Roles of the messages that this package writes."""
SOURCE_PREFIX = "reasoning_gym/"
"""Prefix of a row's ``data_source`` if it is reasoning-gym's; the generator's name follows."""

Problems = Iterator[tuple[str, str]]
"""Pairs of a field and what is wrong with it."""


def chat_problems(prompt: Any) -> Problems:
    """Problems of a prompt that is to be text messages, the last of them the user's."""
    prompt = plain(prompt)
    yield from prompt_problems(prompt)
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if isinstance(last, Mapping) and last.get("role") != "user":
        yield "", "the last message is not the user's"


def prompt_problems(
    prompt: Any, roles: tuple[str, ...] | None = ROLES, parts: bool = False
) -> Problems:
    """Problems of a prompt that is to be chat messages; fields begin behind ``prompt``.

    Args:
        roles: that a message may have; None for any.
        parts: whether a message may consist of parts, as with images.
    """
    prompt = plain(prompt)
    if not isinstance(prompt, (list, tuple)) or not len(prompt):
        yield "", f"{short(prompt)} is not a list of chat messages"
        return
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not (
            is_text(message.get("role")) if roles is None else message.get("role") in roles
        ):
            yield (
                f"[{i}].role",
                f"{short(message)} has no role {_either(roles or ('of any name',))}",
            )
        elif not is_text(message.get("content")) and not (parts and _is_parts(message)):
            yield f"[{i}].content", f"{short(message.get('content'))} is not a non-empty string"


def reward_problems(row: Mapping[str, Any]) -> Problems:
    """Problems of a row of verl's schema for the rewards of this package."""
    if not is_text(row.get("data_source")):
        yield "data_source", f"{short(row.get('data_source'))} is not a non-empty string"
    truth = key_of(row.get("reward_model"), "ground_truth")
    if not is_text(truth):
        yield "reward_model.ground_truth", f"{short(truth)} is not a non-empty string"
    answer_format = key_of(row.get("extra_info"), "answer_format")
    if answer_format and answer_format not in ANSWER_FORMATS:
        yield (
            "extra_info.answer_format",
            f"{short(answer_format)} is none of {', '.join(ANSWER_FORMATS)}",
        )
    if str(row.get("data_source")).startswith(SOURCE_PREFIX) and not _is_object(
        key_of(row.get("extra_info"), "entry")
    ):
        yield (
            "extra_info.entry",
            f"{short(key_of(row.get('extra_info'), 'entry'))} is not a reasoning-gym entry as JSON",
        )


def key_of(value: Any, key: str) -> Any:
    """``value[key]`` of a mapping that has it, else None."""
    return value.get(key) if isinstance(value, Mapping) else None


def _is_parts(message: Mapping[str, Any]) -> bool:
    content = plain(message.get("content"))
    if isinstance(content, list) and content:
        return all(isinstance(part, (str, Mapping)) for part in content)
    return content is None and bool(message.get("tool_calls"))


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):  # no string, or no JSON: not an object either
        return False


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
