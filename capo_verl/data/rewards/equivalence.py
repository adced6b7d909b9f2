# SPDX-License-Identifier: Apache-2.0
r"""Equality of an answer and the reference, in the workers (``worker.py``).

Both are brought into one notation (``notation.py``), then taken apart from the outside: lists,
tuples, sets and equations (``structure.py``), numbers with a unit, a base or a percent sign
(``quantities.py``), and at last single values (``values.py``). What is left, intervals and
inequalities among it, is compared by math-verify.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from capo_verl.data.rewards import quantities
from capo_verl.data.rewards.final_form import is_final
from capo_verl.data.rewards.notation import normalise, spelling, steps
from capo_verl.data.rewards.numerals import digits
from capo_verl.data.rewards.structure import LIST, SET, Group, Relation, structure, union
from capo_verl.data.rewards.values import is_opaque, parse, same_object, same_value, scaled

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MEMBERS = 40
"""Members of a list that are compared with all of another."""
CHOICE = re.compile(
    r"\s*(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?\(?\s*([A-J])\s*\)?(?:[\s.:)]+.*)?", re.DOTALL
)
CHOICES = re.compile(r"[A-J]")
LETTERED = re.compile(r"\\text\s*\{\s*\(([A-J])\)\s*\}\s*(\S.*)")
"""A choice with its letter."""
LETTERS = re.compile(r"[A-Za-z]+")
NAME = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|\\frac\{d\w*\}\{d\w\}|\\(?:vec|overrightarrow|overline|hat|bar)\s*\{\w+\}|"
    r"\\mathbb\{\w\}|\\?[a-zA-Z](?:_(?:\{\w+\}|\d+|[a-zA-Z]))?(?:\([^()=]*\))?|[\s,()+|'*-])+"
)
MAX_NAME = 60
"""Characters of the longest left side that is read as a name."""


def equal(reference: str, answer: str) -> bool:
    """Equality of two answers in LaTeX or plain notation.

    Percent signs: "50%" equals "50", and "0.5", and "50%" only on the other side. What only
    restates the question equals nothing (``final_form.py``).
    """
    wanted, given = _normalised(_first_line(reference), answer)
    if not wanted or not given:
        return False
    return is_final(wanted, given, same) and same(wanted, given)


def explain(reference: str, answer: str) -> Iterator[str]:
    """Lines that say what is compared: each step of notation, then what each side is read as."""
    for what, text in (("reference", _first_line(reference)), ("answer", answer)):
        yield f"{what}: {text}"
        for name, after in steps(text):
            yield f"  {name}: {after}"
        yield f"  read as {_reading(normalise(text))}"
    wanted, given = _normalised(_first_line(reference), answer)
    if not is_final(wanted, given, same):
        yield "the answer restates the question, or states something untrue on the way"


def _normalised(reference: str, answer: str) -> tuple[str, str]:
    """Both in one notation. ``70,110`` is a list beside a list, and else a number."""
    wanted, given = normalise(reference), normalise(answer)
    if _is_list(wanted) and not _is_list(given):
        given = normalise(answer, without=digits)
    elif _is_list(given) and not _is_list(wanted):
        wanted = normalise(reference, without=digits)
    return wanted, given


def _is_list(text: str) -> bool:
    found = structure(text)
    return isinstance(found, Group) and found.kind == LIST


def _reading(text: str) -> str:
    """Reading of a normalised answer, for people."""
    found = structure(text)
    if isinstance(found, Group):
        return f"{found.kind} of {len(found.members)}: {' | '.join(found.members)}"
    if isinstance(found, Relation):
        return f"a relation: {' | '.join(found.members)}"
    text, percent = quantities.percent(quantities.currency(found))
    if percent:
        return f"{text} percent, or a hundredth of it"
    if based := quantities.base(text):
        return f"the digits {based[0]} in base {based[1]}"
    if len(members := quantities.ratio(text)) > 1:
        return f"a ratio or a time of day: {' | '.join(members)}"
    if carried := quantities.quantity(text):
        return f"{carried.value} with {carried.unit or 'a label'}"
    if _are_words(text):
        return "words"
    return f"the value {parse(text)}"


def same(reference: str, answer: str) -> bool:
    """Equality of two answers in normalised notation."""
    if reference == answer or spelling(reference) == spelling(answer):
        return True
    wanted, given = structure(reference), structure(answer)
    if isinstance(wanted, Relation) or isinstance(given, Relation):
        return _same_relation(reference, answer, wanted, given)
    if isinstance(wanted, Group) or isinstance(given, Group):
        return _same_group(reference, answer, wanted, given)
    return _same_single(reference, answer)


# --- equations and inequalities -------------------------------------------------------------------


def _same_relation(
    reference: str, answer: str, wanted: Group | Relation | str, given: Group | Relation | str
) -> bool:
    if isinstance(given, Relation) and given.is_equation and not isinstance(wanted, Relation):
        return same(reference, _stated(given))
    if isinstance(wanted, Relation) and wanted.is_equation and not isinstance(given, Relation):
        left = wanted.members[0]
        return (_is_name(left) or not _has_unknown(left)) and same(_stated(wanted), answer)
    if isinstance(wanted, Relation) and isinstance(given, Relation):
        if wanted.is_equation and given.is_equation:
            return _same_equation(wanted, given)
        for chain in (given, given.reversed()):
            if wanted.signs == chain.signs and all(
                same(*pair) for pair in zip(wanted.members, chain.members, strict=True)
            ):
                return True
        if not (_has_unknown(reference) and _has_unknown(answer)):
            return False
    return _whole(reference, answer)


def _stated(equation: Relation) -> str:
    r"""The member of a chain that is its value: the last.

    A value before ``\approx`` or ``\in`` is what is stated.
    """
    for member, sign in zip(equation.members, equation.signs, strict=False):
        if sign != "=" and not _is_name(member):
            return member
    return equation.members[-1]


def _same_equation(wanted: Relation, given: Relation) -> bool:
    left, other = wanted.members[0], given.members[0]
    if spelling(left) == spelling(other):
        if same(_stated(wanted), _stated(given)):
            return True
        if _is_name(left):
            return False
    names = _is_name(left) and _is_name(other)
    if names or not (_has_unknown(left + _stated(wanted)) and _has_unknown(other + _stated(given))):
        swapped = same(left, _stated(given)) and same(_stated(wanted), other)
        if (
            swapped
            or names
            and not (_has_unknown(_stated(wanted)) and _has_unknown(_stated(given)))
        ):
            return swapped
    if len(wanted.members) != 2 or len(given.members) != 2:
        return False
    return _same_zeros(wanted, given)


def _same_zeros(wanted: Relation, given: Relation) -> bool:
    """True if two equations differ by a constant factor only; else math-verify solves them."""
    import sympy

    sides = [parse(member) for member in (*wanted.members, *given.members)]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    a, b = sides[0] - sides[1], sides[2] - sides[3]
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols or is_opaque(a, b):
        return False
    if a.free_symbols != b.free_symbols:
        return False
    point = {symbol: sympy.Rational(1009 + 17 * i, 733) for i, symbol in enumerate(symbols)}
    factor = (a.subs(point) / b.subs(point)).evalf(30) if b.subs(point) != 0 else sympy.nan
    if factor.is_number and factor.is_finite and factor != 0:
        exact = sympy.nsimplify(factor, rational=True, tolerance=sympy.Float("1e-20", 30))
        if same_object(a, b * exact):
            return True
    return same_object(sympy.Eq(sides[0], sides[1], evaluate=False),
                       sympy.Eq(sides[2], sides[3], evaluate=False))  # fmt: skip


def _is_name(text: str) -> bool:
    r"""True for what an equation defines: ``x``, ``f(2)``, ``(x, y)``, ``\text{Area}``."""
    return len(text) <= MAX_NAME and bool(NAME.fullmatch(text))


def _has_unknown(text: str) -> bool:
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text)
    return bool(re.search(r"[a-zA-Z]", re.sub(r"(?<![a-zA-Z])[ei](?![a-zA-Z])", "", bare)))


# --- lists, tuples and sets -----------------------------------------------------------------------


def _same_group(
    reference: str, answer: str, wanted: Group | str | Relation, given: Group | str | Relation
) -> bool:
    if not isinstance(wanted, Group) or not isinstance(given, Group):
        return _one_against_many(reference, answer, wanted, given)
    kinds = {wanted.kind, given.kind}
    if kinds <= {LIST, SET}:
        return _same_members(wanted.members, given.members)
    if wanted.kind == given.kind or kinds == {LIST, "()"}:
        return len(wanted.members) == len(given.members) and all(
            same(*pair) for pair in zip(wanted.members, given.members, strict=True)
        )
    return False


def _one_against_many(
    reference: str, answer: str, wanted: Group | str | Relation, given: Group | str | Relation
) -> bool:
    group = wanted if isinstance(wanted, Group) else given
    one = answer if group is wanted else reference
    assert isinstance(group, Group)
    if group.kind == LIST:
        if LETTERS.fullmatch(one) and all(CHOICES.fullmatch(_words(m)) for m in group.members):
            return sorted(one) == sorted(_words(member) for member in group.members)
        parts = union(one)
        if len(parts) == len(group.members) > 1:
            return _same_members(tuple(parts), group.members)
        return len(group.members) > 1 and all(same(one, member) for member in group.members)
    if len(group.members) == 1 and group.kind in (SET, "[]"):
        return False
    if "matrix" in one and group.kind == "()":
        column = re.fullmatch(r"\\begin\{[pb]?matrix\}(.*)\\end\{[pb]?matrix\}", one, re.DOTALL)
        members = [member.strip() for member in column[1].split(r"\\")] if column else []
        return "&" not in one and len(members) == len(group.members) and all(
            same(*pair) for pair in zip(group.members, members, strict=True)
        )  # fmt: skip
    return _whole(reference, answer)


def _same_members(wanted: tuple[str, ...], given: tuple[str, ...]) -> bool:
    """True if each member of one has its equal among the other's."""
    if max(len(wanted), len(given)) > MAX_MEMBERS or not wanted or not given:
        return wanted == given
    wanted, given = _flat(wanted), _flat(given)
    left = list(given)
    matched: list[str] = []
    for member in wanted:
        found = next((other for other in left if same(member, other)), None)
        if found is None:
            if not any(same(member, other) for other in matched):
                return False
        else:
            left.remove(found)
            matched.append(found)
    return all(any(same(member, other) for member in wanted) for other in left)


def _flat(members: tuple[str, ...]) -> tuple[str, ...]:
    r"""Members with those that stand for two: ``1\pm2``."""
    found = [structure(member) for member in members]
    return tuple(
        part
        for member, shape in zip(members, found, strict=True)
        for part in (
            shape.members if isinstance(shape, Group) and shape.kind == LIST else (member,)
        )
    )


def _whole(reference: str, answer: str) -> bool:
    """Comparison of intervals, inequalities and unions by math-verify."""
    parts, others = union(reference), union(answer)
    if len(parts) > 1 and len(parts) == len(others) and _same_members(tuple(parts), tuple(others)):
        return True
    a, b = parse(reference), parse(answer)
    return a is not None and b is not None and same_object(a, b)


# --- single values --------------------------------------------------------------------------------


def _same_single(reference: str, answer: str) -> bool:
    reference, answer = quantities.currency(reference), quantities.currency(answer)
    wanted, wanted_percent = quantities.percent(reference)
    given, given_percent = quantities.percent(answer)
    if wanted_percent or given_percent:
        return _same_percent(wanted, given, wanted_percent, given_percent)
    special = _same_special(reference, answer)
    if special is not None:
        return special
    return _same_quantity(reference, answer)


def _same_percent(wanted: str, given: str, wanted_percent: bool, given_percent: bool) -> bool:
    if same(wanted, given):
        return True
    if wanted_percent == given_percent:
        return False
    if wanted_percent:
        return same(f"\\frac{{{wanted}}}{{100}}", given)
    return same(wanted, f"\\frac{{{given}}}{{100}}")


def _same_special(reference: str, answer: str) -> bool | None:
    """Verdict on choices, words, bases, times, ratios; None if neither side is any of them."""
    if lettered := LETTERED.fullmatch(reference):
        return same(lettered[1], answer) or same(lettered[2], answer)
    if CHOICES.fullmatch(_words(reference)):
        match = CHOICE.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer))
        return match is not None and match[1] == _words(reference)
    if _are_words(reference) or _are_words(answer):
        return _words(reference).casefold() == _words(answer).casefold()
    based, other = quantities.base(reference), quantities.base(answer)
    if based or other:
        a, b = based or (reference.lstrip("0"), 0), other or (answer.lstrip("0"), 0)
        return a[0] == b[0] and (a[1] == b[1] or 0 in (a[1], b[1]))
    divided, other_divided = quantities.remainder(reference), quantities.remainder(answer)
    if divided or other_divided:
        return divided == other_divided
    time, other_time = quantities.clock(reference), quantities.clock(answer)
    if time and other_time and (time[2] or other_time[2] or 0 in (time[1], other_time[1])):
        return time[:2] == other_time[:2] and (
            time[2] == other_time[2] or "" in (time[2], other_time[2])
        )
    members, others = quantities.ratio(reference), quantities.ratio(answer)
    if len(members) > 1 or len(others) > 1:
        return _same_ratio(members, others)
    return None


def _same_ratio(members: list[str], others: list[str]) -> bool:
    if len(members) == len(others):
        return all(
            same(f"({members[0]})\\cdot({b})", f"({others[0]})\\cdot({a})")
            for a, b in zip(members[1:], others[1:], strict=True)
        )
    if {len(members), len(others)} != {1, 2}:
        return False
    pair, one = (members, others[0]) if len(members) == 2 else (others, members[0])
    return same(f"\\frac{{{pair[0]}}}{{{pair[1]}}}", one)


def _same_quantity(reference: str, answer: str) -> bool:
    if quantities.DEGREE.search(reference + answer):
        wanted, given = quantities.degrees(reference), quantities.degrees(answer)
        if _same_measured(quantities.undegreed(wanted), quantities.undegreed(given)):
            return True
    return _same_measured(quantities.radians(reference), quantities.radians(answer))


def _same_measured(reference: str, answer: str) -> bool:
    wanted, given = quantities.quantity(reference), quantities.quantity(answer)
    value = wanted.value if wanted else reference
    other = given.value if given else answer
    if wanted and given and wanted.unit and given.unit:
        if wanted.unit.kind != given.unit.kind:
            return False
        other = scaled(other, given.unit.factor / wanted.unit.factor)
    return same_value(value, other)


# --- words ----------------------------------------------------------------------------------------


def _words(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s()\"'.,!?-]+", "", text)


def _are_words(text: str) -> bool:
    r"""True for text without a number in it: ``\text{Yes}``, ``Monday``, ``AB``.

    Two or three small letters may be a product.
    """
    bare = re.sub(r"\\text\s*\{[^{}]*\}", "", text)
    if "\\" in bare or re.search(r"[\d=+*/^_]", text):
        return False
    letters = _words(text)
    if not letters.isalpha():
        return False
    return not bare.strip() or len(letters) > 3 or (len(letters) > 1 and letters.isupper())


def _first_line(reference: str) -> str:
    """A reference without the words below it, as some sets have them."""
    first, *rest = reference.strip().split("\n")
    return first if all(re.fullmatch(r"[A-Za-z ,.]*", line) for line in rest) else reference
