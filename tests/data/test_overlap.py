# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from capo_verl.data.overlap import Overlap, duplicates, normalise, overlap
from capo_verl.data.rows import make_row
from capo_verl.data.templates import TEMPLATES

LONG = (
    "Natalia sold clips to {} of her friends in April, and then she sold half as many clips in "
    "May, how many in all?"
)


def rows(*pairs, template="qwen-math"):
    return [
        make_row("s", question, TEMPLATES[template], answer, "math", index=i, split="x")
        for i, (question, answer) in enumerate(pairs)
    ]


def test_normalise():
    assert normalise("What  is $\\dfrac{1}{2}\\,x$?") == normalise("what is \\frac{1}{2} x")
    assert normalise("1 + 2") != normalise("1 - 2")


def test_duplicates_and_contradictions():
    found = duplicates(
        rows(
            ("What is 1+1?", "2"),
            ("What is 2+2?", "4"),
            ("what is  $1+1$", "2"),
            ("What is 1+1?", "3"),
        )
    )
    assert found.exact == 2
    assert found.contradictions == [(0, 3)]


def test_exact_and_near_overlap_across_templates():
    train = rows(
        ("What is 1+1?", "2"),
        (LONG.format(48), "72"),
        ("Something else entirely, of no relation to any other", "1"),
    )
    test = rows((LONG.format(480), "720"), ("What is 1 + 1?", "2"), template="boxed")
    found = overlap(
        train, test, ["Please reason step by step, and put your final answer within \\boxed{}."]
    )
    assert found == Overlap(exact=[(0, 1)], near=[(1, 0)])
    assert found.training_rows == {0, 1}
    assert overlap(train, test, near=False).near == []


def test_short_questions_are_not_near():
    assert overlap(rows(("What is 1+1?", "2")), rows(("What is 1+2?", "3"))) == Overlap()
