# SPDX-License-Identifier: Apache-2.0
"""``capo-verl data judge``."""

from __future__ import annotations

import pytest

from capo_verl.commands.main import main


def judge(capsys, *texts: str) -> tuple[int, list[str]]:
    code = main(["data", "judge", *texts])
    return code, capsys.readouterr().out.splitlines()


def test_the_steps_of_a_right_answer(capsys):
    code, lines = judge(capsys, "10 cm", r"So it is \boxed{$\mathbf{100}$ mm}")
    assert code == 0
    assert lines == [
        "reference: 10 cm",
        "  read as 10 with a unit of length (times 1/100)",
        r"answer: $\mathbf{100}$ mm",
        "  decoration: 100  mm",
        "  layout: 100 mm",
        "  read as 100 with a unit of length (times 1/1000)",
        "equal: 1",
    ]


def test_a_wrong_answer(capsys):
    code, lines = judge(capsys, r"\{1,2\}", "(1,2)")
    assert code == 1
    assert lines[-1] == "not equal: 0"
    assert r"  read as \{\} of 2: 1 | 2" in lines and "  read as () of 2: 1 | 2" in lines


def test_a_restated_question_says_so(capsys):
    code, lines = judge(capsys, "120", "5!")
    assert code == 1
    assert lines[-2:] == [
        "the answer restates the question, or states something untrue on the way",
        "not equal: 0",
    ]


def test_what_cannot_be_judged(capsys):
    code, lines = judge(capsys, "5", "2^{2^{100}}")
    assert (code, lines) == (1, ["the answer could not be judged (timeout) and scores 0"])


@pytest.mark.parametrize("texts", [[], ["5"], ["5", "6", "7"]])
def test_two_texts_are_needed(capsys, texts):
    assert main(["data", "judge", *texts]) == 2
    assert f"judge REFERENCE ANSWER: {len(texts)} texts were given" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "reading"), [
    ("2:3", "a ratio or a time of day: 2 | 3"), ("x=2", "a relation: x | 2"),
    ("75%", "75 percent, or a hundredth of it"),
    ("4210_5", "the digits 4210 in base 5"), ("Monday", "words"), ("12 apples", "12 with a label"),
    (r"\frac12", "the value 1/2"), ("1,2", "list of 2: 1 | 2"),
])  # fmt: skip
def test_what_a_text_is_read_as(capsys, text, reading):
    assert f"  read as {reading}" in judge(capsys, text, "1")[1]
