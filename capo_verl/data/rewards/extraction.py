# SPDX-License-Identifier: Apache-2.0
"""The final answer in a response: the contents of the last box or of the last answer tags."""

from __future__ import annotations

import re

MAX_ANSWER_CHARS = 1000
"""A longer answer is wrong: the longest reference answers have some two hundred characters."""

BOX = re.compile(r"\\(?:boxed|fbox|framebox(?:\[[^\]]*\]){0,2})(?![a-zA-Z])\s*")
BARE = re.compile(r"[^\s${}\\]+")
ANSWER_FORMATS = ("boxed", "tags", "plain")


def final_answer(response: str, answer_format: str = "boxed") -> str | None:
    """The answer that counts, or None if the response has none.

    Args:
        answer_format: ``boxed`` takes boxes and answer tags, whichever comes last; ``tags`` takes
            answer tags only; ``plain`` takes the whole response. A box between tags is opened.

    Raises:
        ValueError: for another format.
    """
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(
            f"extra_info.answer_format={answer_format!r}: expected one of "
            f"{', '.join(ANSWER_FORMATS)}"
        )
    if answer_format == "plain":
        return response.strip() or None
    tagged = _last_tags(response)
    boxed = _last_box(response) if answer_format == "boxed" else None
    if tagged is not None and (boxed is None or boxed[1] < tagged[1]):
        inner = tagged[0].strip()
        if answer_format == "boxed" or BOX.match(inner):
            inner = last_box(inner) or inner
        return inner or None
    return (boxed[0].strip() or None) if boxed else None


def last_box(text: str) -> str | None:
    r"""Contents of the last complete ``\boxed{...}`` that has any, or ``\fbox``, ``\framebox``.

    Nested boxes are opened.
    """
    found = _last_box(text)
    return found[0].strip() if found else None


def _last_tags(text: str) -> tuple[str, int] | None:
    end = text.rfind("</answer>")
    while end >= 0:
        start = text.rfind("<answer>", 0, end)
        if start < 0:
            return None
        inside = text[start + len("<answer>") : end]
        if inside.strip():
            return inside, end
        end = text.rfind("</answer>", 0, start)
    return None


def _last_box(text: str) -> tuple[str, int] | None:
    """Content and end of the last complete box that has a content; of nested ones, the inner.

    Linear in the text.
    """
    opened: list[int | None] = []
    starts = {match.end(): match for match in BOX.finditer(text)}
    last: tuple[str, int] | None = None
    i = 0
    while i < len(text):
        character = text[i]
        if character == "\\" and i not in starts:
            if i + 1 < len(text) and text[i + 1] in "{}\\":
                i += 2
                continue
        elif character == "{":
            opened.append(i + 1 if i in starts else None)
        elif character == "}" and opened:
            start = opened.pop()
            if start is not None:
                inside = last is not None and last[1] > start
                content = last[0] if last and inside else text[start:i]
                if re.search(r"[^\s{}]", BOX.sub("", content)):
                    last = (content, i)
        elif i in starts:
            # TeX's box without braces, as some of MATH's solutions have it: up to the end of the
            # formula.
            bare = BARE.match(text, i)
            if bare and re.search(r"\w", bare[0]):
                last = (bare[0], bare.end())
        i += 1
    return last
