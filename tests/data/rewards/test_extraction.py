# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import pytest

from capo_verl.data.rewards.extraction import final_answer, last_box


@pytest.mark.parametrize(("response", "answer"), [
    (r"First \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),
    (r"\fbox{4}", "4"),
    (r"so $\boxed 2$.", "2"),
    (r"\boxed{x = \boxed{5}}", "5"),
    (r"\boxed{3} and then \boxed{4", "3"),
    (r"{ \boxed{4} } } {", "4"),
    ("<answer> 5 </answer>", "5"),
    ("<answer>1</answer><answer>2</answer>", "2"),
    (r"<answer>\boxed{7}</answer>", "7"),
    (r"<answer>1</answer> \boxed{2}", "2"),
    (r"\boxed{2} <answer>1</answer>", "1"),
    (r"\boxed{3} <answer> 4", "3"),
    ("the answer is 5", None),
    (r"\boxed{}", None),
    (r"\boxed{3", None),
    (r"\boxedfoo{3}", None),
    ("<answer></answer>", None),
    ("", None),
])  # fmt: skip
def test_boxes_and_tags(response, answer):
    assert final_answer(response, "boxed") == answer


def test_other_formats():
    assert final_answer(r"\boxed{1}", "tags") is None
    assert final_answer(r"\boxed{1} <answer>{2}</answer>", "tags") == "{2}"
    assert final_answer("  a\nb ", "plain") == "a\nb"
    assert final_answer("  ", "plain") is None
    with pytest.raises(ValueError, match="answer_format='box': expected one of boxed, tags, plain"):
        final_answer("1", "box")


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed ", "<answer>", "{", "}", "\\boxed{1}", "\\boxed{\\boxed{1}"]
)
def test_time_is_linear(piece):
    def seconds(count):
        start = time.process_time()
        final_answer(piece * count)
        return time.process_time() - start

    seconds(1000)
    assert seconds(40_000) < 2.0  # what is quadratic takes minutes


def test_last_box():
    assert last_box(r"a \boxed{1} b \boxed{ 2 } c") == "2"
    assert last_box("no box") is None
