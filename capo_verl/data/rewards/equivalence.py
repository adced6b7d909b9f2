# SPDX-License-Identifier: Apache-2.0
r"""Equality of an answer and the reference, by math-verify, in the workers (``worker.py``).

Only math-verify's LaTeX extraction is used: its parser is a grammar (ANTLR) that builds sympy
objects and evaluates no string. The extraction of plain expressions, ``ExprExtractionConfig``,
hands text to sympy's ``parse_expr``, which is ``eval``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from capo_verl.data.rewards.final_form import is_final

MAX_DEPTH = 30
"""Nesting of brackets that is parsed; the parser's time grows quickly with it."""
MAX_DIGITS = 400
"""Digits in a row that are parsed."""

PERCENT = re.compile(r"\s*\\?%\s*$|\s*(?:\\text\{\s*)?percent\s*\}?\s*$", re.IGNORECASE)


def equal(reference: str, answer: str) -> bool:
    """Symbolic equality of two answers in LaTeX or plain notation.

    Percent signs: "50%" equals "50", and "0.5", and "50%" only on the other side. What only
    restates the question equals nothing (``final_form.py``).
    """
    return is_final(reference, answer, _same_value) and _same_value(reference, answer)


def _same_value(reference: str, answer: str) -> bool:
    reference_plain, answer_plain = PERCENT.sub("", reference), PERCENT.sub("", answer)
    reference_percent, answer_percent = reference_plain != reference, answer_plain != answer
    if _verify(reference_plain, answer_plain):
        return True
    if reference_percent == answer_percent:
        return False
    if reference_percent:
        return _verify(_hundredth(reference_plain), answer_plain)
    return _verify(reference_plain, _hundredth(answer_plain))


def parse(text: str) -> list[Any]:
    """Math-verify's view of one answer: sympy's object if it can be parsed, and the text."""
    if not is_parsable(text):
        return []
    import math_verify

    return math_verify.parse(
        f"\\boxed{{{text}}}",
        extraction_config=[_extraction()],
        parsing_timeout=None,
        fallback_mode="first_match",
    )


def is_parsable(text: str) -> bool:
    """True if the text may be given to the parser.

    It is printable, its brackets are closed and not nested too deeply, and no number is endless.
    """
    if any(ord(c) < 32 and c not in "\t\n\r" for c in text) or re.search(
        rf"\d{{{MAX_DIGITS + 1}}}", text
    ):
        return False
    depth = braces = 0
    for i, character in enumerate(text):
        escaped = i > 0 and text[i - 1] == "\\"
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth = max(0, depth - 1)
        if not escaped:
            braces += {"{": 1, "}": -1}.get(character, 0)
        if depth > MAX_DEPTH or braces < 0:
            return False
    return braces == 0


def _verify(reference: str, answer: str) -> bool:
    import math_verify

    wanted = _parse_reference(reference)
    given = parse(answer)
    # The workers have their own limit of time: math-verify's needs the main thread and does not
    # stop what C code does.
    return bool(wanted and given) and math_verify.verify(
        wanted, given, allow_set_relation_comp=True, timeout_seconds=None
    )


@lru_cache(maxsize=4096)
def _parse_reference(reference: str) -> list[Any]:
    return parse(reference)


@lru_cache(maxsize=1)
def _extraction() -> Any:
    from math_verify import LatexExtractionConfig

    return LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)


def _hundredth(text: str) -> str:
    return f"\\frac{{{text}}}{{100}}"
