# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path

from capo_verl.data.datasets import markdown
from capo_verl.data.rewards.math_answers import compute_score

DOCS = Path(__file__).parents[2] / "docs/data.md"


def test_the_table_in_the_docs_is_the_registrys():
    """To renew it: paste what ``capo-verl data --list`` prints."""
    between = (
        DOCS.read_text(encoding="utf-8")
        .split("capo-verl data --list -->\n")[1]
        .split("<!-- end -->")[0]
    )
    assert between.strip() == markdown()


def test_the_table_of_equal_answers():
    """Each answer in it is judged as its column says."""
    page = DOCS.with_name("answers.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*`) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    found = {True: 0, False: 0}
    for reference, *columns in (row for row in rows if "`" in row[2]):
        for expected, column in zip((True, False), columns, strict=True):
            for answer in re.findall(r"`([^`]+)`", column):
                verdict = compute_score("math", f"\\boxed{{{answer}}}", reference.strip("`"))
                assert bool(verdict["score"]) is expected, (reference, answer)
                found[expected] += 1
    assert found[True] > 45 and found[False] > 35
