# SPDX-License-Identifier: Apache-2.0
r"""Verdicts of the reward on what is written in boxes, kind by kind.

``verdicts.jsonl`` has a line per case: ``kind``, ``reference``, ``answer`` as it stands in
``\boxed{}``, ``score``, and ``arguable`` where people would differ. The cases are from public
reports about answer checkers, from data sets, and from trying.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from capo_verl.data.rewards.math_answers import compute_score
from capo_verl.data.rewards.pool import pool

Case = tuple[str, str, float]

KNOWN = {
    # "75%" is 75, and a hundredth of it; nothing tells the two apart but the question.
    ("10", "10\\%", 0),
    # Nor does anything tell newtons from a variable (7N is not 7, below).
    ("10", "10N", 1),
}
"""Cases that are judged wrongly, each with the reason."""


def cases() -> dict[str, list[Case]]:
    found = defaultdict(list)
    for line in Path(__file__).with_name("verdicts.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        found[case["kind"]].append((case["reference"], case["answer"], case["score"]))
    return found


CASES = cases()


def judged_wrongly(kind: list[Case]) -> set[Case]:
    return {
        (reference, answer, score)
        for reference, answer, score in kind
        if compute_score("math", f"\\boxed{{{answer}}}", reference)["score"] != score
    }


@pytest.mark.parametrize("kind", CASES)
def test_verdicts(kind):
    assert judged_wrongly(CASES[kind]) == KNOWN & set(CASES[kind])


def test_the_table_is_whole():
    assert sum(map(len, CASES.values())) > 1200
    assert {case for kind in CASES.values() for case in kind} > KNOWN


@pytest.mark.parametrize("kind", CASES)
def test_a_reference_is_its_own_answer(kind):
    references = {reference for reference, _, _ in CASES[kind] if "\\boxed" not in reference}
    assert judged_wrongly([(reference, reference, 1) for reference in references]) == set()


@pytest.mark.parametrize("piece", [
    "a", "_a", "f(a)", "(a)", "\\text{a}", "a_1", "1 ", "1,111,", "0.1212", "\\frac{1}{", "**a",
    "`",
    "and ", "cm ", "^2", "$", "{", "\\{", "=", "\\pm", ":", "\u00b2", "\\overline{3}",
    "the answer is ",
])  # fmt: skip
@pytest.mark.parametrize("around", ["{}", "{}1=5", "5 {}!"])
def test_a_long_answer_is_read_in_time(piece, around):
    """No pattern takes for ever: what is long is judged, or refused.

    The limit is far above the seconds that the longest takes: a machine may be slow, and a pattern
    that goes back over what it has read would take hours.
    """
    answer = around.format((piece * 1000)[:900])
    for request in (
        {"reference": "5", "answer": answer}, {"reference": answer, "answer": "5"}
    ):  # fmt: skip
        assert pool("math", 1).judge(request, 60.0).trouble != "timeout"
