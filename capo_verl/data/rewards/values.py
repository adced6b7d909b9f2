# SPDX-License-Identifier: Apache-2.0
r"""Equality of two values: exact for numbers, at many places for expressions.

latex2sympy2_extended, math-verify's parser, is a grammar (ANTLR) that builds sympy objects and
evaluates no string. Numbers written with digits are rationals here, never binary floats, so that
neither the tiny nor the huge are rounded.
"""

from __future__ import annotations

import math
import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_DEPTH = 30
"""Nesting of brackets that is parsed; the parser's time grows quickly with it."""
MAX_DIGITS = 400
"""Digits in a row that are parsed."""
APPROXIMATE = 1e-6
"""Largest difference between a number that no decimal can write and a decimal that stands for it,
absolutely; ten times that relatively."""
EXACT_DIGITS = 15
"""Digits from which on a decimal is what a computer printed: its last ones are noise."""
ROUNDED_DIGITS = 7
"""Digits from which on a decimal may be another one, rounded."""
PRECISION = 60
"""Decimal digits to which two irrational numbers agree if they are equal."""
PLACES = 6
"""Points at which two expressions with unknowns are compared."""

NUMBER = re.compile(r"[+-]?\s*(?:\d+\.?\d*|\.\d+)")
FRACTION = re.compile(r"([+-]?)\s*\\frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
SLASH = re.compile(r"([+-]?\s*\d+)\s*/\s*(\d+)")


def same_value(reference: str, answer: str) -> bool:
    """Equality of two values in normalised notation."""
    wanted, given = _exact(reference), _exact(answer)
    if wanted is not None and given is not None:
        return _same_rational(wanted, given)
    a, b = parse(reference), parse(answer)
    return a is not None and b is not None and same_object(a, b)


def same_object(a: Any, b: Any) -> bool:
    """Equality of two parsed objects: numbers, expressions, matrices; the rest by math-verify."""
    import sympy

    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return (
            isinstance(a, sympy.MatrixBase)
            and isinstance(b, sympy.MatrixBase)
            and a.shape == b.shape
            and all(same_object(*pair) for pair in zip(a.flat(), b.flat(), strict=True))
        )
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_expression(a, b)
    return _by_math_verify(a, b)


@lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    r"""Sympy's object for one answer, or None if it cannot be parsed.

    Single letters keep their case; a lone ``i`` is the imaginary unit.
    """
    if not is_parsable(text):
        return None
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True,
                                 nits=False, boxed="none", equations=False)  # fmt: skip
    try:
        found = latex2sympy(
            normalize_latex(text, config),
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:
        raise
    # The parser raises bare exceptions; what cannot be read equals nothing.
    except Exception:
        return None
    if isinstance(found, sympy.Basic | sympy.MatrixBase):
        found = found.subs(sympy.Symbol("i", real=True), sympy.I)
    return found


def is_parsable(text: str) -> bool:
    """True if the text may be given to the parser.

    It is printable, its brackets are closed and not nested too deeply, and no number is endless.
    """
    if any(ord(c) < 32 and c not in "\t\n\r" for c in text):
        return False
    # Two numbers side by side are neither one number nor a product.
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}|(?<![_^\d.])\d[\d.]*\s+[\d.]", text):
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


def scaled(text: str, factor: Fraction) -> str:
    """The value times ``factor``, in normalised notation."""
    if factor == 1:
        return text
    exact = _exact(text)
    if exact is None:
        return rf"({text})\cdot\frac{{{factor.numerator}}}{{{factor.denominator}}}"
    value = exact[0] * factor
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


# --- rationals ------------------------------------------------------------------------------------


def _exact(text: str) -> tuple[Fraction, int] | None:
    """A plain number and the significant digits of its decimal, 0 if it is written without one."""
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    if NUMBER.fullmatch(text):
        bare = text.replace(" ", "")
        return Fraction(bare), len(bare.lstrip("+-0.").replace(".", "")) if "." in bare else 0
    found = FRACTION.fullmatch(text) or SLASH.fullmatch(text)
    if found is None or not int(found[found.re.groups]):
        return None
    sign, *parts = found.groups() if found.re is FRACTION else ("", *found.groups())
    value = Fraction(int(parts[0].replace(" ", "")), int(parts[1]))
    return (-value if sign == "-" else value), 0


def _same_rational(a: tuple[Fraction, int], b: tuple[Fraction, int]) -> bool:
    """Exact equality, but for decimals that stand for something they cannot write.

    A decimal stands for a number like a third if it is close to it; a long one for a longer one
    that it rounds; one with more digits than a binary float has for what is left without its noise.
    """
    (x, x_digits), (y, y_digits) = a, b
    if x == y:
        return True
    if not x or not y or not (x_digits or y_digits):
        return False
    difference = abs(x - y)
    if not x_digits or not y_digits:
        exact = y if x_digits else x
        return not _terminates(exact) and _close(difference, abs(exact))
    if max(x_digits, y_digits) > EXACT_DIGITS and difference * 10**EXACT_DIGITS < 5 * abs(x):
        return True
    short, written = min(((x, x_digits), (y, y_digits)), key=lambda pair: pair[1])
    if x_digits == y_digits or written < ROUNDED_DIGITS:
        return False
    size = math.floor(math.log10(abs(short.numerator)) - math.log10(short.denominator))
    return 2 * difference <= Fraction(10) ** (size - written + 1)


def _terminates(value: Fraction) -> bool:
    """True if a decimal can write the number."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _close(difference: Any, size: Any) -> bool:
    return bool(difference < APPROXIMATE and difference < 10 * APPROXIMATE * size)


# --- expressions ----------------------------------------------------------------------------------


def _same_expression(a: Any, b: Any) -> bool:
    import sympy

    a_decimals, b_decimals = a.atoms(sympy.Float), b.atoms(sympy.Float)
    a, b = _rational(a), _rational(b)
    if a == b:
        return True
    if not (a.free_symbols or b.free_symbols) and not is_opaque(a, b):
        if a.is_infinite or b.is_infinite or sympy.nan in (a, b):
            return False
        if a.is_Rational and b.is_Rational:
            pair = [
                (Fraction(int(v.p), int(v.q)), max(map(_digits, decimals), default=0))
                for v, decimals in ((a, a_decimals), (b, b_decimals))
            ]
            return _same_rational(*pair)
        return _same_number(a, b, bool(a_decimals) != bool(b_decimals) or not (
            _is_rational(a) and _is_rational(b)) and bool(a_decimals))  # fmt: skip
    if is_opaque(a, b):
        return _by_math_verify(a, b)
    return _same_function(a, b)


def _rational(expression: Any) -> Any:
    """The expression with its decimals as rationals, evaluated; odd roots of negatives are real."""
    import sympy

    decimals = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    if decimals:
        expression = expression.xreplace(decimals)
    roots = {
        power: -((-power.base) ** power.exp)
        for power in expression.atoms(sympy.Pow)
        if power.base.is_Rational
        and power.base.is_negative
        and power.exp.is_Rational
        and power.exp.p == 1
        and power.exp.q % 2 == 1
        and power.exp.q > 1
    }
    return expression.xreplace(roots).doit() if roots else expression.doit()


def _digits(number: Any) -> int:
    mantissa = re.split("e", str(number), flags=re.IGNORECASE)[0]
    return len(mantissa.replace(".", "").strip("-0")) or 1


def _is_rational(value: Any) -> bool:
    return all(bool(part.is_Rational) for part in value.as_real_imag())


def is_opaque(*expressions: Any) -> bool:
    """True if an expression cannot be evaluated at a point."""
    import sympy
    from sympy.core.function import AppliedUndef

    opaque = (AppliedUndef, sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit,
              sympy.Set, sympy.MatrixExpr)  # fmt: skip
    return any(expression.has(*opaque) for expression in expressions)


def _same_number(a: Any, b: Any, approximate: bool) -> bool:
    import sympy

    size = sympy.Max(abs(a).evalf(20), abs(b).evalf(20))
    if not size.is_number or not size.is_finite:
        return False
    difference = abs((a - b).evalf(20, maxn=3 * PRECISION))
    if difference <= size * sympy.Float(10, 20) ** -PRECISION:
        return True
    return approximate and _close(difference, size)


def _same_function(a: Any, b: Any) -> bool:
    """Equality of two expressions at :data:`PLACES` points at which both are defined.

    Points are rationals without meaning, the same in every process, half of them negative. Where
    one of two real expressions is not real, neither counts.
    """
    import sympy

    unknown = sorted(a.free_symbols | b.free_symbols, key=str)
    complex_ = a.has(sympy.I) or b.has(sympy.I)
    chance = random.Random(20)
    agreed = 0
    for place in range(3 * PLACES):
        sign = (1, 1, -1)[place % 3] if len(unknown) == 1 else 0
        point = {
            symbol: sympy.Rational(chance.randint(1, 4000), 1009) * (sign or chance.choice((1, -1)))
            for symbol in unknown
        }
        if place % 4 == 3:
            point = {symbol: abs(value) for symbol, value in point.items()}
        x, y = (expression.subs(point).evalf(30, maxn=200) for expression in (a, b))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            continue
        if not complex_ and not (x.is_real and y.is_real):
            continue
        if abs(x - y) > sympy.Max(abs(x), abs(y)) * sympy.Float("1e-22", 20):
            return False
        agreed += 1
        if agreed == PLACES:
            return True
    return agreed > 0


def _by_math_verify(a: Any, b: Any) -> bool:
    import math_verify

    # The workers have their own limit of time: math-verify's needs the main thread and does not
    # stop what C code does.
    return bool(math_verify.verify(a, b, allow_set_relation_comp=True, timeout_seconds=None))
