# SPDX-License-Identifier: Apache-2.0
"""The text of a cell and of an answer: the value's own, or an error that names the cell."""

from __future__ import annotations

import datetime
import decimal
import fractions

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from capo_verl.data.rows import read_answer
from capo_verl.data.values import is_empty, text_of

D = decimal.Decimal


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"),
        (" 5\n", "5"),
        ("1e+22", "1e+22"),  # text is what its author wrote
        (5, "5"),
        (0, "0"),
        (-3, "-3"),
        (12345678901234567890123, "12345678901234567890123"),
        (5.0, "5"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (2.50, "2.5"),
        (100.0, "100"),
        (1e22, "1" + "0" * 22),
        (1e23, "1" + "0" * 23),
        (1e-7, "0.0000001"),
        (123456789012345680.0, "123456789012345680"),
        (D("5.00"), "5"),
        (D("-0.0"), "0"),
        (D("2.50"), "2.5"),
        (D("1E+3"), "1000"),
        (np.int64(5), "5"),
        (np.uint8(5), "5"),
        (np.float64(5), "5"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.str_("5"), "5"),
        (np.array(5), "5"),
        (np.array("5", dtype=object), "5"),
        (pa.scalar(5), "5"),
        (pa.scalar("5"), "5"),
        (pa.scalar(D("5.00")), "5"),
    ],
    ids=repr,
)
def test_the_text_of_a_value(value, text):
    assert text_of(value, "here") == text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "it is empty"),
        ("", "it is empty"),
        (" \t\n", "it is empty"),
        (float("nan"), "it is empty"),
        (np.float32("nan"), "it is empty"),
        (D("nan"), "it is empty"),
        (pa.scalar(None), "it is empty"),
        (float("inf"), "inf is not finite"),
        (D("-Infinity"), "-Infinity is not finite"),
        (np.float64("inf"), "inf is not finite"),
        (D("1e1001"), "the number has more than 1000 digits"),
        (10**1001, "the number has more than 1000 digits"),
        (True, "True is of type bool"),
        (np.bool_(False), "False is of type bool"),
        (["5"], "['5'] is of type list"),
        (("5",), "('5',) is of type tuple"),
        ({"5"}, "{'5'} is of type set"),
        ({"a": 1}, "{'a': 1} is of type dict"),
        (np.array([5]), "is of type list"),
        (b"5", "b'5' is of type bytes"),
        (bytearray(b"5"), "is of type bytearray"),
        (datetime.date(2020, 1, 1), "is of type date"),
        (datetime.datetime(2020, 1, 1), "is of type datetime"),
        (datetime.time(1), "is of type time"),
        (datetime.timedelta(1), "is of type timedelta"),
        (np.datetime64("2020-01-01", "ns"), "is of type datetime64"),
        (pd.Timestamp("2020-01-01"), "is of type Timestamp"),
        (pd.NaT, "is of type NaTType"),
        (pd.NA, "is of type NAType"),
        (1 + 2j, "is of type complex"),
        (fractions.Fraction(1, 2), "is of type Fraction"),
        (object, "is of type type"),
        ("5\ud800", "is no valid text: surrogates not allowed"),
        ('[{"role": "user", "content": "q"}]', "is the text of a list or an object"),
        ("[{'content': 'q', 'role': 'user'}]", "is the text of a list or an object"),
        ("{'style': 'rule', 'ground_truth': '5'}", "is the text of a list or an object"),
        (' {"ground_truth": "5"}', "is the text of a list or an object"),
    ],
    ids=repr,
)
def test_what_has_no_text_is_refused(value, problem):
    with pytest.raises(ValueError) as error:
        text_of(value, "x.csv, record 3, column answer")
    assert str(error.value).startswith("x.csv, record 3, column answer: ")
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "{1, 2}", "['x']", "{x: role}", "the role: [{]"])
def test_brackets_of_mathematics_are_text(text):
    assert text_of(text, "here") == text


@pytest.mark.parametrize(
    ("value", "empty"),
    [(None, True), (float("nan"), True), ("", True), ("\n", True), (0, False), ("0", False),
     (False, False), ([], False), ({}, False)],
    ids=repr,
)  # fmt: skip
def test_an_empty_cell(value, empty):
    assert is_empty(value) == empty


@pytest.mark.parametrize(
    ("value", "form", "answer"),
    [
        ("5", "plain", "5"),
        ("27.0", "plain", "27"),
        (27.0, "plain", "27"),
        ("$5$", "plain", "5"),
        ("$2$, $3$", "plain", "$2$, $3$"),
        (["1", "2"], "plain", "1, 2"),
        (("1", "2"), "plain", "1, 2"),
        ([1, 2.0], "plain", "1, 2"),
        (["$5$"], "plain", "5"),
        (np.array([1.5, 2]), "plain", "1.5, 2"),
        (np.array([0.1], dtype=np.float32), "plain", "0.1"),
        (pa.scalar(["1", "2"]), "plain", "1, 2"),
        ("so $\\boxed{5}$", "boxed", "5"),
        (["\\boxed{1}", "\\boxed{2}"], "boxed", "1, 2"),
        ("x\n#### 5", "hashes", "5"),
        ("x\n#### 5\nextra", "hashes", "5"),
        ("x\n####\n5\nextra", "hashes", "5"),
        ("#### 1\n#### 2\nextra", "hashes", "2"),
        ("#### 1,250", "hashes", "1250"),
        ("#### -1,250,000.50", "hashes", "-1250000.50"),
        ("#### $1,250", "hashes", "$1250"),
        ("#### (1,2)", "hashes", "(1,2)"),
        ("#### (1,250)", "hashes", "(1,250)"),
        ("#### 1, 250", "hashes", "1, 250"),
        ("9 apples", "quantity", "9"),
        (9, "quantity", "9"),
        ({"style": "rule", "ground_truth": "5"}, "boxed", "5"),
        ({"ground_truth": 5.0}, "plain", "5"),
        ({"ground_truth": ["5"]}, "plain", "5"),
        ({"ground_truth": "$5$"}, "plain", "$5$"),  # as it is
        ({"ground_truth": "#### 5\nx"}, "hashes", "#### 5\nx"),
    ],
    ids=repr,
)
def test_answer(value, form, answer):
    assert read_answer(value, form, "here") == answer


@pytest.mark.parametrize(
    ("value", "form", "problem"),
    [
        ([], "plain", "here: no answer of the form 'plain' in '[]'"),
        (["1", None], "plain", "here[1]: it is empty"),
        (["1", True], "plain", "here[1]: True is of type bool"),
        ([["1"], ["2"]], "plain", "here[0]: ['1'] is of type list"),
        ([{"a": 1}], "plain", "here[0]: {'a': 1} is of type dict"),
        (np.array([[1, 2]]), "plain", "here[0]: [np.int64(1), np.int64(2)] is of type list"),
        ({"a": 1}, "plain", "here: {'a': 1} is of type dict"),
        ({"value": "5"}, "plain", "here: {'value': '5'} is of type dict"),
        ({"ground_truth": None}, "plain", "here.ground_truth: it is empty"),
        ({"ground_truth": {"target": 5}}, "plain", "here.ground_truth: {'target': 5} is of type"),
        ({"ground_truth": ["5", "6"]}, "plain", "here.ground_truth: ['5', '6'] has 2 values: one"),
        ({"ground_truth": []}, "plain", "here.ground_truth: [] has 0 values: one"),
        ("5", "boxed", "here: no answer of the form 'boxed' in '5'"),
        (["\\boxed{1}", "2"], "boxed", "here: no answer of the form 'boxed' in"),
        ("x ####", "hashes", "here: no answer of the form 'hashes' in"),
        ("$ $", "plain", "here: no answer of the form 'plain' in '$ $'"),
    ],
    ids=repr,
)
def test_no_answer(value, form, problem):
    with pytest.raises(ValueError) as error:
        read_answer(value, form, "here")
    assert str(error.value).startswith(problem)
