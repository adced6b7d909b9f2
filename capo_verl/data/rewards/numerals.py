# SPDX-License-Identifier: Apache-2.0
"""Numbers in one way of writing: steps of notation for separators, powers of ten, words."""

from __future__ import annotations

import re
from fractions import Fraction

THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:[, ']\d{3})+(?![\d{])(?!,\d)")
EXPONENT = re.compile(
    r"(?<![A-Za-z\d.\\_^{])(\d+\.?\d*|\.\d+)\s?[eE]\s?(?:([+-]?\d+)|\{([+-]?\d+)\})(?![\d.A-Za-z^])"
)
TIMES_TEN = re.compile(r"(?<=\d)\s*(?:x|X|\*)\s*10\s*(?:\^|\*\*)")
REPEATING = re.compile(
    r"(\d+)\s*\.\s*(\d*)\s*(?:\\(?:overline|bar|dot|overset\{\.\})\s*(?:\{(\d+)\}|(\d))|\((\d+)\))"
)
GOING_ON = re.compile(r"(?<![\d.])(\d+)\.(\d*?)(\d{1,6}?)\3{1,}\s*(?:\.\.\.|\\ldots)$")
MIXED = re.compile(
    r"(?<![\d.\\^_{}/A-Za-z)])(?<![\d})] )(\d+)\s*(?:\s(\d+)\s*/\s*(\d+)(?![\d.])|"
    r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d)))(?!\s*[\^\d])"
)
ORDINAL = re.compile(
    r"^(\d+)\s*(?:\^\s*)?(?:\{\s*)?(?:\\text\s*\{\s*)?(?:st|nd|rd|th)(?:\s*\})*$", re.IGNORECASE
)
WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12}  # fmt: skip
SCALED = re.compile(rf"^(-?[\d.]+) (?:\\text\s*\{{\s*)?({'|'.join(SCALES)})s?(?:\s*\}})?(?![a-z])")


def digits(text: str) -> str:
    r"""Numbers without separators of thousands: ``12{,}345``, ``12,345``, ``12 345``.

    Between brackets a comma separates members.
    """
    if not re.search(r"\d", text):
        return text
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", text)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        opens = character in "([" or text.startswith(r"\{", i)
        closes = character in ")]" or text.startswith(r"\}", i)
        if opens and depth == 0 or closes and depth == 1:
            part = text[start:i]
            parts.append(part if depth else THOUSANDS.sub(_joined, part))
            start = i
        depth = max(0, depth + opens - closes)
    part = text[start:]
    return "".join([*parts, part if depth else THOUSANDS.sub(_joined, part)])


def _joined(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def exponents(text: str) -> str:
    r"""Powers of ten in one way: ``1.4e6``, ``4.5 x 10^33``, ``3*10**8``."""
    text = TIMES_TEN.sub(r"\\times 10^", text)
    text = EXPONENT.sub(lambda m: rf"{m[1]}\times 10^{{{int(m[2] or m[3])}}}", text)
    return re.sub(r"10\^\s*([+-]?\d+)(?!\d)", r"10^{\1}", text)


def repeating(text: str) -> str:
    r"""Repeating decimals as fractions: ``0.\overline{3}``, ``0.1\dot6``, ``0.(3)``, ``0.333...``.
    """  # fmt: skip
    text = REPEATING.sub(lambda m: _fraction(m[1], m[2], m[3] or m[4] or m[5]), text)
    return GOING_ON.sub(
        lambda m: _fraction(m[1], m[2], m[3]) if len(m[0].rstrip(".")) > 4 else m[0], text
    )


def _fraction(whole: str, fixed: str, period: str) -> str:
    value = Fraction(int(whole + fixed + period) - int(whole + fixed),
                     10 ** len(fixed) * (10 ** len(period) - 1))  # fmt: skip
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def mixed(text: str) -> str:
    r"""Mixed numbers as fractions: ``2 2/3``, ``2\frac23``. Improper ones are products."""

    def fraction(match: re.Match[str]) -> str:
        whole, above, below = (
            int(match[1]),
            int(match[2] or match[4] or match[5]),
            int(match[3] or match[6] or match[7]),
        )
        if not 0 < above < below:
            return match[0]
        return rf"\frac{{{whole * below + above}}}{{{below}}}"

    return MIXED.sub(fraction, text)


def words(text: str) -> str:
    """Numbers in words, and with them: ``two``, ``twenty-one``, ``2 million``, ``3rd``."""
    spelled = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip().lower()
    parts = re.split(r"[\s-]+", spelled)
    if all(part in WORDS for part in parts):
        values = [WORDS[part] for part in parts]
        if len(values) == 1 or (len(values) == 2 and values[0] >= 20 and 0 < values[1] < 10):
            return str(sum(values))
    if len(parts) == 2 and parts[0] in WORDS and parts[1].rstrip("s") in SCALES:
        return str(WORDS[parts[0]] * SCALES[parts[1].rstrip("s")])
    found = ORDINAL.match(text)
    if found:
        return found[1]
    found = SCALED.match(text)
    if found and found[1].count(".") < 2 and found[1].strip("-."):
        value = Fraction(found[1]) * SCALES[found[2]]
        if value.denominator == 1:
            return f"{value.numerator}{text[found.end() :]}"
    return text
