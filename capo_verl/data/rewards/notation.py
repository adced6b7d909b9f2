# SPDX-License-Identifier: Apache-2.0
r"""One notation for what may be written in many: the steps before two answers are compared.

Each step is a function from text to text that knows one habit of writing. :data:`STEPS` lists them
in the order in which they are taken. None changes what the text says, and none evaluates it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction

# --- characters -----------------------------------------------------------------------------------

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "→": r"\to ",
    "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "•": r"\cdot ",
    "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "°": r"^{\circ}", "º": r"^{\circ}", "℃": r"^{\circ}C", "℉": r"^{\circ}F",
    "−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-", "‐": "-", "‑": "-", "‒": "-", "―": "-",
    "，": ",", "、": ",", "；": ";", "。": ".",
    "′": "'", "″": "''", "‘": "'", "’": "'", "“": '"', "”": '"',
    "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "…": r"\ldots ",
    "⋯": r"\ldots ", "∠": r"\angle ", "△": r"\triangle ", "∼": r"\sim ",
}  # fmt: skip
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
RADICAL = re.compile(r"(?:(∛|∜)|√)\s*(\d+(?:\.\d+)?|[A-Za-zπ]|(?=[({]))")


def characters(text: str) -> str:
    r"""Unicode as LaTeX: ``2√3``, ``x²``, ``½``, ``−``, ``∞``, full-width digits."""
    if text.isascii():
        return text
    text = INVISIBLE.sub("", text)
    for table, sign in ((SUPERSCRIPTS, "^"), (SUBSCRIPTS, "_")):
        runs = re.compile(f"[{re.escape(''.join(table))}]+")
        text = runs.sub(
            lambda run, t=table, s=sign: f"{s}{{{''.join(t[c] for c in run[0])}}}",  # type: ignore[misc]
            text,
        )
    text = RADICAL.sub(_radical, text)
    return "".join(_character(character) for character in text)


def _radical(match: re.Match[str]) -> str:
    index = {"∛": "[3]", "∜": "[4]", None: ""}[match[1]]
    return rf"\sqrt{index}{{{match[2]}}}" if match[2] else rf"\sqrt{index}"


def _character(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    if unicodedata.category(character) == "So":  # a check mark, or another picture
        return ""
    compatible = unicodedata.normalize("NFKC", character)
    if "⁄" in compatible:  # one half and the like
        above, below = compatible.split("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    return compatible


# --- decoration -----------------------------------------------------------------------------------

STYLES = (
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|normal)?|math(?:bf|it|rm|sf|tt|cal|scr|normal)|emph|underline|"
    r"boldsymbol|bm|pmb|mbox|hbox|operatorname\*?|overbrace|underbrace|boxed|fbox|framebox|"
    r"(?:text|f)?color(?:box)?\s*\{[^{}]*\}(?:\s*\{[^{}]*\}(?=\s*\{))?|ensuremath|[Ll]arge|LARGE|[hH]uge|small|bf|rm|it)"
)
STYLED = re.compile(STYLES + r"\s*\{([^{}]*)\}")
ENUMERATION = re.compile(
    r"(?:\d[\d.]*|[A-J])(?:\s*(?:,\s*(?:and|or)?|and|or)\s+(?:\d[\d.]*|[A-J]))+"
)
"""Numbers, or letters of choices, in a text."""
SWITCHES = re.compile(
    r"\\(?:bf|it|rm|sf|tt|em|large|Large|LARGE|huge|Huge|small|tiny|footnotesize|scriptsize|"
    r"normalsize|displaystyle|textstyle|scriptstyle|nonumber|strut|relax|null|square|blacksquare|qed|"
    r"(?:tag|label|[vh]phantom)\s*\{[^{}]*\}|"
    r"limits|nolimits|bold|boldmath|checkmark|color\s*\{[^{}]*\}|hfill|rule\{[^{}]*\}\{[^{}]*\})"
    r"(?![a-zA-Z])\s*"
)
SPACES = re.compile(r"\\(?:[,;: ]|q?quad(?![a-zA-Z])|hspace\*?\{[^{}]*\}|enspace(?![a-zA-Z]))|~")
DELIMITERS = re.compile(r"\\[()\[\]](?!\s*\d+(?:\.\d+)?\s*(?:pt|em|ex|cm|mm)\b)")
MARKDOWN = re.compile(
    r"\*\*(?=\S)(.+?)(?<=\S)\*\*|__(?=\S)(.+?)(?<=\S)__|`([^`]+)`|"
    r"^\*([^*]+)\*$|^_([^_]+)_$|^'([^']+)'$|^\"([^\"]+)\"$"
)
HTML = re.compile(r"</?(?:b|i|u|em|strong|span|div|p|code|sub|sup)(?:\s[^<>]*)?>", re.IGNORECASE)
ARRAY = re.compile(
    r"[(\[]\s*\\begin\s*\{(?:array\}\s*\{[^{}]*\}|(?:small)?matrix\})((?:(?!\\begin).)*?)"
    r"\\end\s*\{(?:array|(?:small)?matrix)\}\s*[)\]]",
    re.DOTALL,
)
INTRODUCTION = re.compile(
    r"^(?:(?:so|thus|hence|therefore)[,\s]+)?(?:the\s+)?(?:final\s+)?(?:correct\s+)?"
    r"(?:answer|result|solution|value)\s*(?:is|are|equals|:|=)\s*(?:equal\s+to\s+)?:?\s*"
    r"|^(?:we\s+(?:get|have|find|obtain)|it\s+is|it\'s)\s+(?=[\d$\\.-])"
    r"|^(?:about|approximately|approx\.?|roughly|around|nearly|exactly)\s+(?=[\d$\\.-])",
    re.IGNORECASE,
)
NAMED = re.compile(r"^[A-Za-z ]+[=:]\s*(?=[-\d])")
LEADING = re.compile(
    r"^(?:=|:|\\(?:approx|sim|to|rightarrow|Rightarrow|implies|therefore|longrightarrow)(?![a-zA-Z]))\s*"
)
AFTERTHOUGHT = re.compile(
    r"(?<=[\d}])\s+\(\s*(?!and\b|or\b)[A-Za-z][A-Za-z .-]{2,}\)$|"
    r"\s*\(\s*approx(?:imately|\.)?\s*\)$"
)


FOREIGN = {
    "tg": "tan", "ctg": "cot", "cotg": "cot", "cotan": "cot", "arctg": "arctan", "lg": "log",
    "cosec": "csc",
}  # fmt: skip
"""Names of functions as other languages write them."""
FUNCTION_NAMES = {
    name: name
    for name in (
        "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec",
        "csc", "ln", "log", "exp",
    )
} | FOREIGN  # fmt: skip


def layout(text: str) -> str:
    r"""Text without spacing commands, line breaks at its ends, ``\left`` and ``\right``."""
    text = re.sub(r"\\(?:left|right|[bB]igg?[lrm]?)\s*(?=[()\[\]|./<>]|\\[{}|a-z])", "", text)
    text = re.sub(r"\\!\s*", "", text).replace("\\dots", "\\ldots").replace("\\cdots", "\\ldots")
    text = re.sub(r"(=[^=]*?)\s*\\q?quad(?![a-zA-Z])\s*(?=[^=\\]*=)", r"\1, ", text)
    # An escaped line break of a matrix is no space after a backslash.
    text = re.sub(r"\\\\", "\0", text)
    text = SPACES.sub(" ", text).replace("\0", "\\\\")
    text = re.sub(r"\\phantom\s*\{[^{}]*\}", "", text)
    text = ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    for infix, prefix in ((r"\choose", r"\binom"), (r"\over", r"\frac")):
        if infix in text:
            pattern = rf"\{{([^{{}}]*)\{infix}(?![a-zA-Z])([^{{}}]*)\}}"
            text = re.sub(pattern, rf"\{prefix}{{\1}}{{\2}}", text)
    return re.sub(r"\s+", " ", text).strip().removesuffix("\\").rstrip()


def decoration(text: str) -> str:
    r"""Text without fonts, colours, dollar signs and Markdown.

    What is written in letters keeps a ``\text{}``; a number or a single ``e``, ``i`` does not.
    """
    text = DELIMITERS.sub(" ", text)
    text = HTML.sub("", text)
    for _ in "bold", "italic":
        text = MARKDOWN.sub(lambda found: next(filter(None, found.groups())), text)
    previous = None
    while previous != text:  # innermost first
        previous, text = text, STYLED.sub(_unstyled, text)
    text = SWITCHES.sub("", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2:  # a price, not a formula
        text = re.sub(r"(?<!\\)\$(?=\s*-?[\d.])", r"\\$", text, count=1)
    text = re.sub(r"(?<!\\)\$|\\#|^\s*&|&\s*$", "", text)
    return _outer_braces(text.strip())


def _unstyled(match: re.Match[str]) -> str:
    content, command = match[1], match[0]
    bare = content.strip()
    if not bare:
        return " "
    if ENUMERATION.fullmatch(bare) or re.match(r"-?\d[\d.,]*\s+[A-Za-z]", bare):
        return f" {bare} "
    if bare in FUNCTION_NAMES:
        return rf"\{FUNCTION_NAMES[bare]} "
    if command.startswith(r"\operatorname") and bare.isalpha():
        return "\\operatorname\1" + bare + "\2"
    if not re.search(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", bare)) or "\\" in bare:
        return f" {bare} " if bare.lower() not in ("-", "+") else bare
    if bare in ("e", "i", "d") and not command.startswith(r"\text"):
        return bare
    if len(bare) == 1 and command.startswith((r"\mathbf", r"\bold", r"\bm", r"\pmb", r"\mathit")):
        return bare
    return "\\text\1" + content + "\2"  # its braces stay out of the way of the next round


def _outer_braces(text: str) -> str:
    text = text.replace("\1", "{").replace("\2", "}")
    while text.startswith("{") and _closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _closing(text: str, start: int) -> int:
    """Position of the brace that closes the one at ``start``; -1 if there is none."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "{}" and (i == 0 or text[i - 1] != "\\"):
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return -1


def talk(text: str) -> str:
    r"""Text without "the answer is", "about", a leading ``=`` or ``\approx``, a final full stop."""
    text = re.sub(
        r"^\\text\s*\{\s*(?:about|approximately|approx\.?|exactly|roughly)\s*\}", "", text
    )
    spoken = re.fullmatch(r"\\text\s*\{([^{}]*)\}(.*)", text.strip(), re.DOTALL)
    if (
        spoken
        and (said := NAMED.sub("", INTRODUCTION.sub("", spoken[1].strip()))) != spoken[1].strip()
    ):
        text = said + spoken[2]
    text = INTRODUCTION.sub("", text.strip())
    text = re.sub(r"^\\text\s*\{[A-Za-z ]*[=:]\s*\}\s*(?=\S)", "", text)
    text = LEADING.sub("", text)
    text = AFTERTHOUGHT.sub("", text)
    text = re.sub(r"\s+is the (?:final |correct )?answer\.?$", "", text)
    text = re.sub(r"\s*\\text\{\s*\(?approx(?:imately|\.)?\)?\s*\}$", "", text)
    return re.sub(r"(?:[.,;:]|\\\\)+\s*$", "", text).strip()


# --- numbers --------------------------------------------------------------------------------------

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


# --- plain notation -------------------------------------------------------------------------------

FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|max|min|gcd|lcm|det|lim"
)
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
    return PLAIN_FUNCTION.sub(r"\\\1", text)


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
