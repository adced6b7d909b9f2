# SPDX-License-Identifier: Apache-2.0
r"""One notation for what may be written in many: the steps before two answers are compared.

Each step is a function from text to text that knows one habit of writing. :data:`STEPS` lists them
in the order in which they are taken. None changes what the text says, and none evaluates it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from capo_verl.data.rewards.decoration import (
    FOREIGN,
    FUNCTION_NAMES,
    characters,
    decoration,
    layout,
    talk,
)
from capo_verl.data.rewards.numerals import digits, exponents, mixed, repeating, words

FUNCTIONS = "|".join((*FUNCTION_NAMES, "max", "min", "gcd", "lcm", "det", "lim"))
PLAIN_FUNCTION = re.compile(rf"(?<![a-zA-Z\\{{])({FUNCTIONS})(?=\s*[\d(^\\_]|\s+[a-z](?![a-zA-Z]))")
FOREIGN_COMMAND = re.compile(rf"\\({'|'.join(FOREIGN)})(?![a-zA-Z])")
PLAIN_NAMES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?<![a-zA-Z\\])(?:infinity|infty|oo)(?![a-zA-Z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![a-zA-Z\\])(theta|alpha|beta|gamma|phi)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">=|=>"), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![\^*_])\*(?!\*)"), r"\\cdot "),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\(?:lbrace)(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s+(\d)\s+(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:colon)(?![a-zA-Z])"), ":"),
    (FOREIGN_COMMAND, lambda match: rf"\{FOREIGN[match[1]]} "),
    (re.compile(r"\\(?:imath|jmath)(?![a-zA-Z])"), "i"),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])"), r"^{\\circ}"),
    (re.compile(r"\s*\\(?:div)(?![a-zA-Z])\s*"), "/"),
)


def plain(text: str) -> str:
    r"""Plain notation as LaTeX: ``sqrt(2)``, ``exp(x)``, ``pi``, ``*``, ``<=``, ``sin(x)``."""
    if re.search(r"sqrt|cbrt|exp|abs", text):
        for name, before, after in (
            (r"\\?sqrt", r"\sqrt{", "}"),
            (r"(?<!\\)cbrt", r"\sqrt[3]{", "}"),
            (r"\\?exp", "e^{", "}"),
            (r"(?<!\\)abs", "|", "|"),
        ):
            text = _call(text, name, before, after)
        text = re.sub(r"(?<![a-zA-Z\\])sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    if "\\text" in text:  # words are left as they are
        return "".join(
            part if part.startswith("\\text") else _plain_names(part)
            for part in re.split(r"(\\text\s*\{[^{}]*\})", text)
        )
    return _plain_names(text)


def _plain_names(text: str) -> str:
    for pattern, replacement in PLAIN_NAMES:
        text = pattern.sub(replacement, text)
    return PLAIN_FUNCTION.sub(lambda match: rf"\{FUNCTION_NAMES.get(match[1], match[1])}", text)


def _call(text: str, name: str, before: str, after: str) -> str:
    """Rewrite ``name(...)`` with a bracket that is closed, from the inside out."""
    pattern = re.compile(rf"(?<![a-zA-Z])(?:{name})\s*\(")
    for match in reversed(list(pattern.finditer(text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[i], 0)
            if depth == 0:
                inside = text[match.end() : i]
                text = f"{text[: match.start()]}{before}{inside}{after}{text[i + 1 :]}"
                break
    return text


def conditions(text: str) -> str:
    r"""A set given by a condition as the condition: ``\{x\mid x>2\}`` is ``x>2``."""
    return CONDITION.sub(r"\1", text)


def brackets(text: str) -> str:
    """A value without brackets around it: ``(-3)`` is ``-3``. A set is no value.

    Brackets turned outwards are round: ``]0,1[``.
    """
    if text[:1] == "]" or text[-1:] == "[":
        text = OUTWARDS.sub(
            lambda m: f"{m[1].replace(']', '(')}{m[2]}{m[3].replace('[', ')')}", text
        )
    while text.startswith("(") and text.endswith(")") and _group_end(text) == len(text) - 1:
        inside = text[1:-1].strip()
        if not inside or "," in inside or ";" in inside or re.fullmatch(r"[A-Za-z]", inside):
            return text
        text = inside
    return text


def _group_end(text: str) -> int:
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if depth == 0:
            return i
    return -1


OUTWARDS = re.compile(r"([\]\[(])([^\[\]()]*[,;][^\[\]()]*)([\]\[)])")
CONDITION = re.compile(
    r"^\\\{\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{R\}\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*([^|:]+)\\\}$"
)


STEPS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("characters", characters),
    ("layout", layout),
    ("decoration", decoration),
    ("layout", layout),
    ("repeating decimals", repeating),
    ("talk", talk),
    ("digits", digits),
    ("mixed numbers", mixed),
    ("words", words),
    ("exponents", exponents),
    ("plain notation", plain),
    ("sets by a condition", conditions),
    ("brackets", brackets),
)


def spelling(text: str) -> str:
    r"""A text without spaces and ``\text{}``, and without case where it is words."""
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text.strip().strip("$"))
    spelled = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".")
    words = "\\" not in spelled and re.search(r"(?<![a-zA-Z])[a-zA-Z]{2}", text)
    return spelled.casefold() if words else spelled


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Name and outcome of each step that changes the text."""
    for name, step in STEPS:
        after = step(text)
        if after != text:
            yield name, after
        text = after


def normalise(text: str, *, without: Callable[[str], str] | None = None) -> str:
    """The text after all steps, or after all but one."""
    for _, step in STEPS:
        if step is not without:
            text = step(text)
    return text
