# SPDX-License-Identifier: Apache-2.0
r"""The outer shape of an answer: a list, a tuple, a set, an equation, or one value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

OPENING = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}
LIST, SET = "list", r"\{\}"
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
AND = re.compile(
    r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*"
)
RELATIONS = {
    "=": "=", r"\equiv": "=", r"\approx": r"\approx", r"\in": r"\in", "<": "<", ">": ">",
    r"\le": r"\le", r"\ge": r"\ge", r"\ne": r"\ne", r"\lt": "<", r"\gt": ">",
}  # fmt: skip
OPPOSITE = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")


@dataclass(frozen=True)
class Group:
    """Members of a list, of a set, or between a pair of brackets.

    ``kind`` is :data:`LIST`, :data:`SET`, or the two brackets, as ``()``, ``[)``.
    """

    kind: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """Members of a chain ``a = b < c`` and the signs between them."""

    members: tuple[str, ...]
    signs: tuple[str, ...]

    def reversed(self) -> Relation:
        """The chain read from its end: ``3 > x > 2`` for ``2 < x < 3``."""
        return Relation(
            self.members[::-1], tuple(OPPOSITE.get(sign, sign) for sign in self.signs[::-1])
        )

    @property
    def is_equation(self) -> bool:
        return all(sign in ("=", r"\approx", r"\in") for sign in self.signs)


@lru_cache(maxsize=4096)
def structure(text: str) -> Group | Relation | str:
    """Outermost structure of a normalised answer; the text itself if it is one value."""
    commas = _split(AND.sub(",", text), {",", ";"})
    members = [member for member, _ in commas if member]
    if len(members) > 1:
        return Group(LIST, tuple(members))
    chain = _split(text, set(RELATIONS))
    if len(chain) > 1:
        return Relation(
            tuple(member for member, _ in chain), tuple(RELATIONS[sign] for _, sign in chain[1:])
        )
    bracketed = _bracketed(text)
    if bracketed is None and 0 < len(PLUS_MINUS.findall(text)) <= 2:
        return Group(LIST, _both_signs(text))
    return bracketed or text


def union(text: str) -> list[str]:
    r"""Parts of a union ``A\cup B``; one part if it is none."""
    return [member for member, _ in _split(text, {r"\cup"})]


def _both_signs(text: str) -> tuple[str, str]:
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return tuple(re.sub(r"^\+\s*", "", part.strip()) for part in (upper, lower))  # type: ignore[return-value]


def _bracketed(text: str) -> Group | None:
    tokens = TOKEN.findall(text)
    opening = tokens[0] if tokens else ""
    if opening not in OPENING or len(tokens) < 2:
        return None
    closing = tokens[-1]
    if closing not in OPENING.values():
        return None
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in OPENING) - (token in OPENING.values())
        if depth == 0 and i < len(tokens) - 1:
            return None
    inside = "".join(tokens[1:-1]).strip()
    members = tuple(member for member, _ in _split(inside, {",", ";"}))
    braces = (opening, closing) == (r"\{", r"\}")
    if braces and re.search(r"\\mid(?![a-zA-Z])|[|:]", inside):
        return None  # a set given by a condition
    if opening == r"\langle" or closing == r"\rangle":
        opening, closing = "(", ")"
    kind = SET if braces else opening + closing
    if kind == "()" and len(members) == 1:
        return None
    return Group(kind, tuple(member for member in members if member))


def _split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    r"""Parts of ``text`` between separators outside of all brackets, each with the separator before
    it.

    An index ``_{k=1}`` and an environment ``\begin{...} \end{...}`` are brackets.
    """
    parts: list[tuple[str, str]] = []
    depth, start, before, position = 0, 0, "", 0
    for token in TOKEN.findall(text):
        end = position + len(token)
        if token in ("(", "[", "{", r"\{", r"\begin", r"\langle"):
            depth += 1
        elif token in (")", "]", "}", r"\}", r"\end", r"\rangle"):
            depth = max(0, depth - 1)
        elif depth == 0 and token in separators:
            parts.append((text[start:position].strip(), before))
            start, before = end, token
        position = end
    parts.append((text[start:].strip(), before))
    return parts
