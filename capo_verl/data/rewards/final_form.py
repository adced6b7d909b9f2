# SPDX-License-Identifier: Apache-2.0
r"""Refusal of answers that restate the question.

``\sum_{k=1}^{100}k`` is worth 5050 to a computer algebra system.

math-verify evaluates what it compares, and of a chain of equations it looks at the last member
only. So an answer may have no operator that the reference does not have, and what it states on the
way must be true.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_END = r"(?![a-zA-Z])"
_D = r"(?:\\mathrm\s*\{d\}|\\partial|d)"
OPERATORS = {
    what: re.compile(pattern)
    for what, pattern in {
        "sum": rf"\\sum{_END}|∑",
        "product": rf"\\(?:co)?prod{_END}|∏",
        "integral": rf"\\(?:small|o|i*)int{_END}|∫",
        "limit": rf"\\(?:var|inj|proj)?lim(?:sup|inf)?{_END}",
        "derivative": rf"\\[dt]?frac\s*\{{?\s*{_D}[^{{}}]*\}}?\s*\{{\s*{_D}\s*[a-zA-Z\\]",
        "divisor": r"(?<![a-zA-Z])(?:gcd|lcm|hcf)(?![a-zA-Z])",
        # A factorial, but neither LaTeX's space, nor "not equal", nor the end of a sentence.
        "binomial": rf"\\[dt]?binom{_END}|\\choose{_END}|"
        r"(?:[\d)}\]]|(?<![a-zA-Z])[a-zA-Z])\s*!(?!=)",
        # "30 \min" is a time
        "extremum": r"\\(?:max|min|sup|inf)\s*(?:\\left\s*)?(?:[({\[_]|\\\{)",
        "determinant": rf"\\det{_END}|\\begin\s*\{{[vV]matrix\}}",
        "remainder": rf"\\b?mod{_END}",
        "rounding": rf"\\[lr](?:floor|ceil){_END}",
    }.items()
}
SUBSCRIPT = re.compile(r"_\s*\{[^{}]*\}")
SEPARATOR = re.compile(
    r",(?!\d{3}(?!\d))|;|\\\\|&|\\q?quad(?![a-zA-Z])|\\text\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b",
    re.IGNORECASE,
)
EQUALS = re.compile(rf"(?<![<>!:])=|\\equiv{_END}")
WORDS = re.compile(r"\\(?:text|textbf|mathrm|operatorname)\s*\{[^{}]*\}")
UNKNOWN = re.compile(
    r"(?<![a-zA-Z\\])[a-zA-Z]|\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi"
    r"|rho|sigma|tau|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|angle|ell)"
    + _END
)


def is_final(reference: str, answer: str, equal: Callable[[str, str], bool]) -> bool:
    """True if an answer may be compared with the reference at all.

    Args:
        equal: compares the reference with a part of the answer that has no equality sign.
    """
    chains = _chains(answer)
    if any(_operators(chain[-1]) - _operators(reference) for chain in chains):
        return False
    expected = max(len(chain) for chain in _chains(reference))
    # As many members as the reference has are compared as what they are, an equation.
    stated = [
        member
        for chain in chains
        if len(chain) > expected
        for member in chain[:-1]
        if _is_value(member)
    ]
    return all(equal(reference, member) for member in stated)


def _operators(text: str) -> set[str]:
    return {what for what, pattern in OPERATORS.items() if pattern.search(text)}


def _chains(text: str) -> list[list[str]]:
    """Equations of an answer: ``x=1, y=2`` -> ``[[x, 1], [y, 2]]``.

    A sum's or a limit's bounds are no equations.
    """
    return [EQUALS.split(part) for part in SEPARATOR.split(SUBSCRIPT.sub("", text))]


def _is_value(member: str) -> bool:
    """True if it has a number in it and nothing unknown.

    ``2+3`` is one, ``x``, ``f(2)`` and the name of something are not.
    """
    bare = WORDS.sub("", member)
    return bool(re.search(r"\d|\\pi" + _END, bare)) and not UNKNOWN.search(bare)
