# SPDX-License-Identifier: Apache-2.0
r"""Letters and what is around them: steps of notation that keep what is written and drop how.

Unicode becomes LaTeX; fonts, colours, Markdown, spacing and introductions go.
"""

from __future__ import annotations

import re
import unicodedata

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
