# SPDX-License-Identifier: Apache-2.0
r"""Numbers that carry something: a unit, a percent sign, a base, a time of day, a ratio.

A single letter is a variable, never a unit, unless it is set as text: ``7s`` is not 7, but
``7\text{ s}`` is. A unit that one side leaves out is taken as the other's; two units must measure
the same thing, and are converted. A word that is no unit (``12 apples``) is a label, and labels are
not compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

UNITS: dict[str, dict[str, str | int]] = {
    "length": {
        "nm nanometer": "1/1000000000", "mm millimeter 毫米": "1/1000",
        "cm centimeter 厘米": "1/100", "dm decimeter": "1/10", "m meter 米": 1,
        "km kilometer 千米 公里": 1000, "in inch": "254/10000", "ft foot feet": "3048/10000",
        "yd yard": "9144/10000", "mi mile": "1609344/1000",
    },
    "time": {
        "ms millisecond": "1/1000", "s sec second 秒": 1, "min minute 分钟": 60,
        "h hr hour 小时": 3600, "day 天": 86400, "wk week 周": 604800,
    },
    "months": {"month 个月": 1, "yr year 年": 12},
    "mass": {
        "mg milligram": "1/1000", "g gm gram 克": 1, "kg kilogram 千克 公斤": 1000,
        "t ton tonne 吨": 1000000, "oz ounce": "28349523125/1000000000",
        "lb pound": "45359237/100000",
    },
    "dollars": {"cent ¢": "1/100", "dollar usd USD buck": 1},
    "euros": {"euro eur EUR": 1}, "sterling": {"gbp GBP": 1}, "yuan": {"yuan 元 RMB": 1},
    "force": {"N newton": 1}, "energy": {"J joule": 1, "kJ kilojoule": 1000},
    "power": {"W watt": 1, "kW kilowatt": 1000}, "voltage": {"V volt": 1},
    "current": {"A amp ampere": 1}, "resistance": {r"ohm Ω \Omega": 1},
    "frequency": {"Hz hertz": 1, "kHz": 1000, "MHz": 10**6},
    "pressure": {"Pa pascal": 1, "kPa": 1000}, "temperature": {"K kelvin": 1},
    "degrees": {"deg degree 度": 1}, "radians": {"rad radian": 1}, "amount": {"mol mole": 1},
}  # fmt: skip
"""Kind of quantity -> names of its units and how many of the base unit each is."""
COMPOSED = {
    "mph": "mi/h", "mps": "m/s", "fps": "ft/s", "kph": "km/h", "kmph": "km/h", "kmh": "km/h",
    "l": "dm^3", "L": "dm^3", "liter": "dm^3", "litre": "dm^3", "升": "dm^3", "ml": "cm^3",
    "mL": "cm^3", "milliliter": "cm^3", "millilitre": "cm^3", "毫升": "cm^3", "cc": "cm^3",
    "平方厘米": "cm^2", "平方米": "m^2", "平方千米": "km^2", "立方厘米": "cm^3", "立方米": "m^3",
}  # fmt: skip
"""Units that are products of others."""
MAX_RATIO = 8
"""Members of the longest ratio that is read as one."""
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}


@dataclass(frozen=True)
class Unit:
    """Kinds of quantity that a unit measures, each with its power, and its size in base units."""

    kind: tuple[tuple[str, int], ...]
    factor: Fraction

    def __str__(self) -> str:
        kinds = " ".join(name if power == 1 else f"{name}^{power}" for name, power in self.kind)
        return f"a unit of {kinds} (times {self.factor})"


@dataclass(frozen=True)
class Quantity:
    """A value in front of a unit, or of a label that is none (``unit`` is then None)."""

    value: str
    unit: Unit | None


def _table() -> dict[str, tuple[str, Fraction]]:
    """Each spelling of each unit -> what it measures, and how many of the base unit it is."""
    table: dict[str, tuple[str, Fraction]] = {}
    for kind, units in UNITS.items():
        for names, factor in units.items():
            for name in names.split():
                spellings = {name, name.replace("meter", "metre")}
                if len(name) > 1 and name.isascii() and name.islower():
                    spellings |= {spelling + "s" for spelling in spellings}
                if name == "inch":
                    spellings.add("inches")
                table |= dict.fromkeys(spellings, (kind, Fraction(factor)))
    return table


TABLE = _table()
WORD = r"\\text\s*\{[^{}]*\}"
BARE_WORD = r"[A-Za-z]{2,}"
TAIL = re.compile(
    rf"(?P<tail>(?:\s*(?:{WORD}|\\Omega|\\cdot|/|\^\s*\{{?-?\d\}}?|(?<![A-Za-z\\]){BARE_WORD}\.?|"
    rf"[¢]|[\u4e00-\u9fff]+|(?<=\s)m/s(?![A-Za-z])))+)$"
)
PERCENT = re.compile(
    r"\s*(?:(?:\\?%)+|(?:\\text\s*\{)?\s*(?:percent|per cent|percentage|pct)\.?\s*\}?)$",
    re.IGNORECASE,
)
CURRENCIES = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yuan"}
CURRENCY = re.compile(
    r"(?P<sign>-?)\s*(?:US|USD)?\s*(?:\\?(?P<before>[$€£¥₹₽₩])\s*)(?P<amount>-?[\d.\\].*)|"
    r"(?P<value>.*\d)\s*\\?(?P<behind>[$€£¥₹₽₩])"
)
DEGREES = re.compile(r"\s*\^\{\\circ\}\s*(?:\\text\s*\{\s*)?[CFK]?(?:\s*\})?$")
ANGLE_FUNCTION = r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])"
DEGREE = re.compile(r"\^\{\\circ\}")
BASE = re.compile(
    r"([0-9A-Z]+)\s*_\s*(?:\{?\s*\(?(\d{1,2})\)?\s*\}?|\{\s*\\text\s*\{\s*(\w+)\s*\}\s*\})"
)
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
         "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16}  # fmt: skip
CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?:\s*(?:\\text\s*\{\s*)?([ap])\.?\s*m\.?\s*\}?)?",
                   re.IGNORECASE)  # fmt: skip
HOUR = re.compile(r"(\d{1,2})()\s*(?:\\text\s*\{\s*)?([ap])\.?\s*m\.?\s*\}?", re.IGNORECASE)
REMAINDER = re.compile(r"(\d+)\s*(?:\\text\s*\{\s*)?(?:r|rem|remainder)\.?(?:\s*\})?\s*(\d+)",
                       re.IGNORECASE)  # fmt: skip
SECOND_ANSWER = {"or", "and", "not", "maybe", "perhaps", "possibly", "but"}
UNIT_FRACTION = re.compile(
    rf"\\frac\s*\{{\s*({WORD})\s*\}}\s*\{{\s*({WORD}(?:\^\{{?\d\}}?)?)\s*\}}"
)
PART = re.compile(
    rf"(-?\d+(?:\.\d+)?)\s*({WORD}|{BARE_WORD}|[hms](?![A-Za-z]))\s*(?:,|\band\b)?\s*"
)


def percent(text: str) -> tuple[str, bool]:
    """The text without a percent sign at its end, and whether it had one."""
    plain = PERCENT.sub("", text)
    return plain, plain != text


def currency(text: str) -> str:
    r"""An amount with its currency as a unit: ``\$10`` is ``10\text{ dollar}``.

    What stands behind the amount, as in ``\$10\text{ per hour}``, keeps its place.
    """
    match = CURRENCY.fullmatch(text)
    if not match:
        return text
    amount = f"{match['sign'] or ''}{match['amount'] or match['value']}"
    name = CURRENCIES.get(match["before"] or match["behind"])
    if name is None or quantity(amount):
        return amount
    return rf"{amount}\text{{ {name}}}"


def degrees(text: str) -> str:
    """The text without a sign of degrees, or of a temperature, at its end."""
    if re.match(ANGLE_FUNCTION, text):
        return text
    return DEGREES.sub("", text)


def undegreed(text: str) -> str:
    """The text without its degree signs, where no function of an angle is taken."""
    return text if re.search(ANGLE_FUNCTION, text) else DEGREE.sub("", text)


def radians(text: str) -> str:
    r"""The text with its degree signs as numbers: ``15^\circ`` is ``15\cdot\frac{\pi}{180}``."""
    text = re.sub(r"(\d+(?:\.\d+)?|\\frac\{[^{}]*\}\{[^{}]*\})\s*\^\{\\circ\}",
                  r"{(\1\\cdot\\frac{\\pi}{180})}", text)  # fmt: skip
    return DEGREE.sub(r"\\cdot\\frac{\\pi}{180}", text)


def base(text: str) -> tuple[str, int] | None:
    """Digits and base of ``4210_5``, or None."""
    match = BASE.fullmatch(text)
    if not match:
        return None
    number = int(match[2]) if match[2] else BASES.get(match[3].lower(), 0)
    digits = match[1].lstrip("0") or "0"
    if not 2 <= number <= 36 or any(int(digit, 36) >= number for digit in digits):
        return None
    return digits, number


def clock(text: str) -> tuple[int, int, str] | None:
    """Hour, minute and ``a``, ``p`` or nothing, of a time of day, or None."""
    match = CLOCK.fullmatch(text) or HOUR.fullmatch(text)
    if not match or int(match[2] or 0) > 59:
        return None
    return int(match[1]), int(match[2] or 0), (match[3] or "").lower()


def ratio(text: str) -> list[str]:
    """Members of ``a:b:c``; one if it is no ratio."""
    text = re.sub(r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":", text)
    if ":" not in text or re.search(r"[(\[{]\s*[^)\]}]*:", text.replace("frac{", "")):
        return [text]
    members = [member.strip() for member in text.split(":")]
    return members if all(members) and len(members) <= MAX_RATIO else [text]


def remainder(text: str) -> tuple[int, int] | None:
    """Quotient and remainder of ``10 R 2``, or None."""
    match = REMAINDER.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


@lru_cache(maxsize=4096)
def quantity(text: str) -> Quantity | None:
    r"""Value and unit of ``10\text{ cm}``, ``12 apples``, ``3 hours 20 minutes``; None if it has
    neither unit nor label.
    """
    compound = _compound(text)
    if compound:
        return compound
    text = UNIT_FRACTION.sub(r"\1/\2", text)
    match = TAIL.search(text)
    if not match:
        return None
    value, tail = text[: match.start()].strip(), match["tail"]
    if not re.search(r"[\d)}]\s*$|\\pi$", value) or value.endswith(("^", "_")):
        return None
    value, tail = _without_power(value, tail)
    words = _words(tail)
    if not words or not value:
        return None
    unit = _unit(words)
    if unit is None and not _is_label(words, tail):
        return None
    return Quantity(value, unit)


def _without_power(value: str, tail: str) -> tuple[str, str]:
    """A power right behind the number is the number's."""
    match = re.match(r"\s*\^\s*\{?-?\d\}?", tail)
    return (value + match[0], tail[match.end() :]) if match else (value, tail)


def _words(tail: str) -> list[str]:
    r"""Words and signs of a unit: ``\text{ m/s}^2`` -> ``[m, /, s, ^2]``. Empty if a word of it may
    be a variable.
    """
    text = re.sub(r"\\text\s*\{([^{}]*)\}", lambda m: f" \1{m[1]}\1 ", tail)
    words: list[str] = []
    inside = False
    for piece in re.split("(\1)", text):
        if piece == "\1":
            inside = not inside
            continue
        for word in re.findall(
            r"\\cdot|\\Omega|[A-Za-z¢%.]+|[\u4e00-\u9fff]+|/|\^\s*\{?-?\d\}?", piece
        ):
            bare = word.rstrip(".")
            single = len(bare) == 1 and bare.isascii() and bare.isalpha()
            if not inside and single and "m/s" not in tail:
                return []
            if bare:
                words.append(re.sub(r"[\s{}]", "", bare))
    return words


def _unit(words: list[str]) -> Unit | None:
    """The unit that the words name, or None."""
    words = [part for word in words for part in _parts(word)]
    powers: dict[str, int] = {}
    factor, sign, pending, last = Fraction(1), 1, 1, None
    for word in words:
        if word in ("/", "per"):
            sign = -1
        elif word in (r"\cdot", "of"):
            continue
        elif word.startswith("^") or (word in ("squared", "cubed") and last):
            power = POWERS.get(word) or int(word[1:])
            if last is None or not -4 < power < 4:
                return None
            kind, one, direction = last
            powers[kind] += direction * (power - 1)
            factor *= one ** (direction * (power - 1))
        elif word in POWERS:
            pending = POWERS[word]
        else:
            found = TABLE.get(word) or (TABLE.get(word.lower()) if len(word) > 2 else None)
            if found is None:
                return None
            kind, one = found
            powers[kind] = powers.get(kind, 0) + sign * pending
            factor *= one ** (sign * pending)
            last, pending = (kind, one, sign), 1
    kinds = tuple(sorted((kind, power) for kind, power in powers.items() if power))
    return Unit(kinds, factor) if kinds else None


def _parts(word: str) -> list[str]:
    """Words and signs of a composed unit; any other word by itself."""
    composed = COMPOSED.get(word) or COMPOSED.get(word.removesuffix("s"))
    return re.findall(r"[A-Za-z]+|/|\^\d", composed) if composed else [word]


def _is_label(words: list[str], tail: str) -> bool:
    """True for words that count something; single letters and short words may be variables.

    What has a number in it, or says "or", is a second answer.
    """
    if re.search(r"\d", re.sub(r"\^\s*\{?-?\d\}?", "", tail)) or SECOND_ANSWER & {
        word.casefold() for word in words
    }:
        return False
    if "\\text" in tail or re.search(r"[\u4e00-\u9fff]", tail):
        return True
    return tail[:1].isspace() and all(len(word) > 2 and word.isalpha() for word in words)


def _compound(text: str) -> Quantity | None:
    """The sum of ``3 hours 20 minutes`` in the unit of its first part."""
    parts = PART.findall(text)
    if len(parts) < 2 or PART.sub("", text).strip():
        return None
    units = [
        _unit(_words(rf"\text{{{word}}}" if len(word) == 1 else " " + word)) for _, word in parts
    ]
    first = units[0]
    if first is None or any(unit is None or unit.kind != first.kind for unit in units):
        return None
    total = sum(Fraction(number) * unit.factor / first.factor
                for (number, _), unit in zip(parts, units, strict=True) if unit)  # fmt: skip
    return Quantity(rf"\frac{{{total.numerator}}}{{{total.denominator}}}", first)
