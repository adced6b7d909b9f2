# SPDX-License-Identifier: Apache-2.0
"""Each step of notation by itself, and what is read out of a normalised answer."""

from __future__ import annotations

from fractions import Fraction

import pytest

from capo_verl.data.rewards import decoration, notation, numerals, quantities
from capo_verl.data.rewards.structure import Group, Relation, structure, union

STEPS = {
    decoration.characters: [
        ("2√3", r"2\sqrt{3}"), ("√(x+1)", r"\sqrt(x+1)"), ("∛2", r"\sqrt[3]{2}"),
        ("x²+y¹⁰", "x^{2}+y^{10}"), ("10⁻³", "10^{-3}"), ("x₁", "x_{1}"), ("½", r"\frac{1}{2}"),
        ("−7", "-7"), ("１２", "12"), ("x≤3", r"x\le 3"), ("（1，2）", "(1,2)"), ("50％", "50%"),
        ("\ufeff5", "5"), ("90°", r"90^{\circ}"), ("1⁄2", "1/2"), ("plain", "plain"),
    ],
    decoration.layout: [
        (r"\left( 3, \frac{1}{2} \right)", r"( 3, \frac{1}{2} )"), (r"1\,000", "1 000"),
        (r"13~\text{cm}", r"13 \text{cm}"), (r"\ 13\ ", "13"), (r"10,\!000", "10,000"),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}"),
        (r"\phantom{0}13", "13"), (r"\quad 13", "13"),
        (r"{5 \choose 2}", r"\binom{5 }{ 2}"), (r"{1\over 2}", r"\frac{1}{ 2}"),
    ],
    decoration.decoration: [
        (r"\boldsymbol{13}", "13"), (r"\color{blue}{13}", "13"), (r"{\bf 13}", "13"),
        (r"\emph{\textbf{13}}", "13"), ("**13**", "13"), ("***13***", "13"), ("`13`", "13"),
        ("<b>13</b>", "13"), (r"$1$, $2$", "1, 2"), ("$18", r"\$18"), (r"$\$5$", r"\$5"),
        (r"\(9\)", "9"), (r"\mathrm{e}^2", "e^2"), (r"10\mathrm{cm}", r"10\text{cm}"),
        (r"\mathbf{v}", "v"), (r"\text{-}3", "-3"), (r"\operatorname{lcm}(4,6)",
        r"\operatorname{lcm}(4,6)"),
    ],
    decoration.talk: [
        (r"\text{The answer is }13", "13"), ("about 5", "5"), (r"\approx 5", "5"), ("=13", "13"),
        ("13.", "13"), ("13,", "13"), (r"1/2 (cups)", "1/2"), ("f (x)", "f (x)"),
        (r"\text{Answer: 42}", "42"), ("x=5", "x=5"),
    ],
    numerals.digits: [
        ("12,345", "12345"), ("12{,}345", "12345"), ("1 000 000", "1000000"), ("12'345", "12345"),
        ("1,23,4", "1,23,4"), ("1,234.5", "1234.5"), ("(1,234)", "(1,234)"), ("1,2", "1,2"),
        ("0,123", "0,123"), (r"\{100,200\}", r"\{100,200\}"),
        (r"\frac{1,000}{3}", r"\frac{1000}{3}"),
    ],
    numerals.repeating: [
        (r"0.\overline{3}", r"\frac{1}{3}"), (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"5.\overline{27}", r"\frac{58}{11}"), (r"0.\dot3", r"\frac{1}{3}"),
        ("0.(18)", r"\frac{2}{11}"),
        ("0.333...", r"\frac{1}{3}"), (r"0.1212\ldots", r"\frac{4}{33}"), ("0.333", "0.333"),
        ("3.1415...", "3.1415..."),
    ],
    numerals.mixed: [
        ("2 2/3", r"\frac{8}{3}"), (r"2\frac23", r"\frac{8}{3}"),
        (r"-2\dfrac{1}{3}", r"-\frac{7}{3}"),
        (r"2\frac{5}{3}", r"2\frac{5}{3}"), (r"x^2\frac12", r"x^2\frac12"), ("1 2/2", "1 2/2"),
    ],
    numerals.words: [
        ("two", "2"), ("twenty-one", "21"), ("2 million", "2000000"), (r"\text{three}", "3"),
        ("3rd", "3"), (r"1^{\text{st}}", "1"), ("1.5 million", "1500000"),
        ("twenty ten", "twenty ten"),
    ],
    numerals.exponents: [
        ("1.4e6", r"1.4\times 10^{6}"), ("1e-07", r"1\times 10^{-7}"),
        ("5.3E6", r"5.3\times 10^{6}"),
        ("4.5 x 10^33", r"4.5\times 10^{33}"), ("3*10**8", r"3\times 10^{8}"), ("10e", "10e"),
        ("3e^2", "3e^2"), ("x1e5", "x1e5"), ("2e5x", "2e5x"),
    ],
    notation.plain: [
        ("4sqrt(2)", r"4\sqrt{2}"), (r"4\sqrt(2)", r"4\sqrt{2}"),
        ("sqrt(2+sqrt(3))", r"\sqrt{2+\sqrt{3}}"),
        ("exp(16)", "e^{16}"), ("2*pi", r"2\cdot \pi "), ("x**2", "x^2"), ("x<=3", r"x\le 3"),
        ("sin(x)", r"\sin(x)"), (r"\text{pi day}", r"\text{pi day}"), (r"\dfrac12", r"\frac12"),
    ],
    notation.conditions: [
        (r"\{x\mid x>2\}", "x>2"), (r"\{x\in\mathbb{R}:x\ne 1\}", r"x\ne 1"),
        (r"\{x|x>2\}", "x>2"), (r"\{1,2\}", r"\{1,2\}"),
    ],
    notation.brackets: [("(-3)", "-3"), ("((5))", "5"), ("(1,2)", "(1,2)"), ("(1)(2)", "(1)(2)")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [(step, *pair) for step, pairs in STEPS.items() for pair in pairs],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_step(step, before, after):
    assert step(before) == after


def test_every_step_has_a_table():
    assert set(STEPS) == {step for _, step in notation.STEPS}


@pytest.mark.parametrize("text", [case[1] for pairs in STEPS.values() for case in pairs])
def test_normalising_twice_changes_nothing(text):
    once = notation.normalise(text)
    assert notation.normalise(once) == once


@pytest.mark.parametrize(("one", "other", "equal"), [
    ("Evelyn", r"\text{evelyn}", True), ("1 2", "12", False), ("x + y", "x+y", True),
    ("A", "a", False),
    (r"\alpha", r"\Alpha", False),
])  # fmt: skip
def test_spelling(one, other, equal):
    assert (notation.spelling(one) == notation.spelling(other)) is equal


def quantity(text):
    found = quantities.quantity(text)
    return found and (found.value, found.unit and (found.unit.kind, found.unit.factor))


LENGTH, SECOND = (("length", 1),), Fraction(1)


@pytest.mark.parametrize(("text", "expected"), [
    (r"10\text{ cm}", ("10", (LENGTH, Fraction(1, 100)))),
    (r"10\text{ cm}^2", ("10", ((("length", 2),), Fraction(1, 10000)))),
    (r"10\text{ square feet}", ("10", ((("length", 2),), Fraction(3048, 10000) ** 2))),
    (r"5\text{ m/s}^2", ("5", ((("length", 1), ("time", -2)), SECOND))),
    ("3 m/s", ("3", ((("length", 1), ("time", -1)), SECOND))),
    ("60 mph", ("60", ((("length", 1), ("time", -1)), Fraction(1609344, 3600000)))),
    (r"3 hours 20 minutes", (r"\frac{10}{3}", ((("time", 1),), Fraction(3600)))),
    ("2 liters", ("2", ((("length", 3),), Fraction(1, 1000)))),
    ("12 apples", ("12", None)), (r"12\text{ red apples}", ("12", None)),
    ("3厘米", ("3", (LENGTH, Fraction(1, 100)))),
    ("7t", None), ("7 t", None), ("4xy", None), ("12", None), (r"\text{July }4", None), ("x", None),
    ("10kg", ("10", ((("mass", 1),), Fraction(1000)))),
])  # fmt: skip
def test_quantities(text, expected):
    assert quantity(text) == expected


@pytest.mark.parametrize(("read", "text", "expected"), [
    (quantities.base, "4210_5", ("4210", 5)), (quantities.base, r"4210_{\text{five}}", ("4210", 5)),
    (quantities.base, "4210_{(5)}", ("4210", 5)), (quantities.base, "29_8", None),
    (quantities.base, "x_1", None),
    (quantities.clock, "8:05", (8, 5, "")), (quantities.clock, r"8:00 \text{ a.m.}", (8, 0, "a")),
    (quantities.clock, "3 PM", (3, 0, "p")), (quantities.clock, "8:75", None),
    (quantities.clock, "1:2:3", None),
    (quantities.ratio, "1:2:3", ["1", "2", "3"]), (quantities.ratio, r"3\text{ to }5", ["3", "5"]),
    (quantities.ratio, "35", ["35"]), (quantities.remainder, r"10\text{ R }2", (10, 2)),
    (quantities.remainder, "10", None), (quantities.percent, r"75\%", ("75", True)),
    (quantities.percent, r"75\text{ percent}", ("75", True)),
    (quantities.percent, "75", ("75", False)),
    (quantities.currency, r"\$10", r"10\text{ dollar}"),
    (quantities.currency, "10€", r"10\text{ euro}"),
    (quantities.currency, "10", "10"), (quantities.degrees, r"45^{\circ}", "45"),
    (quantities.degrees, r"10^{\circ}C", "10"),
    (quantities.degrees, r"\tan 15^{\circ}", r"\tan 15^{\circ}"),
    (quantities.undegreed, r"180^{\circ}-x", "180-x"),
    (quantities.radians, r"\tan 15^{\circ}", r"\tan {(15\cdot\frac{\pi}{180})}"),
])  # fmt: skip
def test_what_a_number_carries(read, text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("1, 2", Group("list", ("1", "2"))), (r"1\text{ and }2", Group("list", ("1", "2"))),
    ("(1,2)", Group("()", ("1", "2"))), ("(1,2]", Group("(]", ("1", "2"))),
    (r"\{1,2\}", Group(r"\{\}", ("1", "2"))), (r"\langle 1,2\rangle", Group("()", ("1", "2"))),
    (r"3\pm\sqrt2", Group("list", (r"3+\sqrt2", r"3-\sqrt2"))),
    ("(1,2),(3,4)", Group("list", ("(1,2)", "(3,4)"))),
    ("x=2", Relation(("x", "2"), ("=",))), ("0<x<2", Relation(("0", "x", "2"), ("<", "<"))),
    (r"\sum_{k=1}^n k", r"\sum_{k=1}^n k"), ("(1)(2)", "(1)(2)"), (r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\{x:x>3\}", r"\{x:x>3\}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
])  # fmt: skip
def test_structure(text, expected):
    assert structure(text) == expected


def test_union():
    assert union(r"(0,1)\cup(2,3)") == ["(0,1)", "(2,3)"]
    assert union("(0,1)") == ["(0,1)"]
