# SPDX-License-Identifier: Apache-2.0
"""Records with the columns of each data set become rows of verl's schema; bad rows are refused by
name.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from capo_verl.data.datasets import DATASETS, find
from capo_verl.data.rows import check_rows, make_row, math_rows, read_answer
from capo_verl.data.templates import TEMPLATES

BOXED = TEMPLATES["qwen-math"]

# One record per data set, with the columns and the form that its source has, and what must come of
# it.
RECORDS = {
    "math": ({"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": "So "
    "$\\boxed{\\frac{4}{2}}$."},
             "What is $1+1$?", "\\frac{4}{2}"),
    "gsm8k": ({"question": "How much?", "answer": "5*250=<<5*250=1250>>1250 dollars\n#### 1,250"},
        "How much?", "1250"),
    "math500": ({"problem": "Convert.", "solution": "\\boxed{1}", "answer": "\\left( 3, "
    "\\frac{\\pi}{2} \\right)",
                 "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"},
                "Convert.", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "amc23": ({"id": 0, "question": "How far?", "answer": 27.0, "url": "-"}, "How far?", "27"),
    "aime24": ({"id": 60, "problem": "Every morning", "solution": "-", "answer": "204", "url": "-",
        "year": "2024"},
               "Every morning", "204"),
    "aime25": ({"id": "0", "problem": "Find the sum", "answer": "70"}, "Find the sum", "70"),
    "minerva": ({"question": "The spectral line", "answer": "3.03e-2"}, "The spectral line",
        "3.03e-2"),
    "olympiadbench": ({"id": 1606, "question": "Xenia and Sergey", "context": "A game.",
        "final_answer": ["$2$", "3"],
                       "is_multiple_answer": True}, "A game.\nXenia and Sergey", "$2$, 3"),
    "college_math": ({"question": "Simplify $-10-4(n-5)$", "answer": "$10-4 n$"}, "Simplify "
    "$-10-4(n-5)$", "10-4 n"),
    "gaokao2023en": ({"question": "In the plane", "answer": "$A$", "id": "gaokao-1"},
        "In the plane", "A"),
    "asdiv": ({"passage": "Seven red apples.", "question": "How many?", "answer": "9 apples"},
              "Seven red apples.\nHow many?", "9"),
    "gsm8k_100": ({"question": "Benny saw a shark.", "answer": "10%\n\n#### 10\n", "id_orig": 473},
        "Benny saw a shark.", "10"),
}  # fmt: skip


def test_there_is_a_record_for_every_data_set():
    assert RECORDS.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", RECORDS)
def test_reader(name):
    record, question, answer = RECORDS[name]
    (row,) = math_rows(DATASETS[name], [record], "test", BOXED, "x.jsonl")
    assert row["prompt"] == [
        {
            "role": "system",
            "content": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        {"role": "user", "content": question},
    ]
    assert row["reward_model"] == {"style": "rule", "ground_truth": answer}
    assert row["data_source"] == DATASETS[name].data_source
    assert row["extra_info"]["index"] == 0 and row["extra_info"]["answer_format"] == "boxed"
    check_rows([row], "x.jsonl")


def test_lists_from_parquet_are_arrays():
    assert read_answer(np.array(["1", "2"], dtype=object), "plain", "here") == "1, 2"


@pytest.mark.parametrize(("value", "kept"), [("16 oranges", "16"), ("1,250 dollars", "1,250"), ("3 "
"hours and 15 minutes",) * 2,
                                             ("3:4", "3:4"), ("Mrs. Hilt", "Mrs. Hilt"),
                                             ("0.5", "0.5")])  # fmt: skip
def test_only_a_lone_unit_is_dropped(value, kept):
    assert read_answer(value, "quantity", "here") == kept


def test_templates():
    question = "1+1? {question}"
    assert TEMPLATES["plain"].messages(question) == [{"role": "user", "content": question}]
    (message,) = TEMPLATES["boxed"].messages(question)
    assert (
        message["content"]
        == question + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert "<answer> and </answer>" in TEMPLATES["tags"].messages(question)[0]["content"]


@pytest.mark.parametrize(("record", "message"), [
    ({"answer": "1"}, "x.csv, record 0: no question in column problem or question; it has answer: "
    "name it by --question-column"),
    ({"problem": "p", "id": 1}, "x.csv, record 0: no answer in column answer; it has id, problem: "
    "name it by --answer-column"),
    ({"problem": "p", "answer": " "}, "x.csv, record 0, column answer: no answer, it is empty"),
])  # fmt: skip
def test_bad_record(record, message):
    with pytest.raises(ValueError) as error:
        math_rows(DATASETS["math500"], [record], "test", BOXED, "x.csv")
    assert str(error.value) == message


GOOD = make_row("s", "q", BOXED, "1", "math", index=0, split="test")


@pytest.mark.parametrize(("change", "message"), [
    (lambda row: row.pop("data_source"), "f, row 1, data_source: None is not a non-empty string"),
    (lambda row: row.update(ability=""), "f, row 1, ability: '' is not a non-empty string"),
    (lambda row: row.update(prompt="q"), "f, row 1, prompt: 'q' is not a list of chat messages"),
    (lambda row: row.update(prompt=[]), "f, row 1, prompt: [] is not a list of chat messages"),
    (lambda row: row["prompt"][0].pop("role"), "f, row 1, prompt[0].role: "),
    (lambda row: row["prompt"][1].update(content=None), "f, row 1, prompt[1].content: None is not "
    "a non-empty string"),
    (lambda row: row["prompt"].append({"role": "assistant", "content": "a"}), "f, row 1, prompt: "
    "the last message is not the"),
    (lambda row: row["reward_model"].update(style="model"), "f, row 1, reward_model.style: "),
    (lambda row: row["reward_model"].update(ground_truth=3), "f, row 1, reward_model.ground_truth: "
    "3 is not a non-empty string"),
    (lambda row: row["extra_info"].update(index="0"), "f, row 1, extra_info.index: '0' is not of "
    "type int"),
    (lambda row: row.update(extra_info=None), "f, row 1, extra_info: None is not a mapping"),
])  # fmt: skip
def test_bad_row(change, message):
    bad = copy.deepcopy(GOOD)
    change(bad)
    check_rows([GOOD], "f")
    with pytest.raises(ValueError) as error:
        check_rows([GOOD, bad], "f")
    assert str(error.value).startswith(message)


def test_no_rows_at_all():
    with pytest.raises(ValueError, match="^f: no rows$"):
        check_rows([], "f")


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown data set 'gsm8': did you mean 'gsm8k'"):
        find("gsm8")
