# SPDX-License-Identifier: Apache-2.0
"""docs/config.md is what the dataclasses say."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(DOCS))  # as it is for `python docs/config_reference.py`
    spec = importlib.util.spec_from_file_location("config_reference", DOCS / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(DOCS))


def test_the_page_is_up_to_date(reference) -> None:
    assert (DOCS / "config.md").read_text(encoding="utf-8") == reference.written(), (
        "run python docs/config_reference.py"
    )


def test_a_knob_without_description_is_an_error(reference) -> None:
    @dataclass
    class Knobs:
        told: int = 1
        """Like this."""
        untold: int = 2

    with pytest.raises(ValueError, match="untold has no docstring below it"):
        reference.descriptions(Knobs)


def test_defaults_are_written_as_on_the_command_line(reference) -> None:
    rows = dict(
        line[2:].split(" | ")[:2]
        for line in reference.render().splitlines()
        if line.startswith("| `capo.")
    )
    assert rows["`capo.top_k`"] == "`50`"
    assert rows["`capo.policy_shift_max`"] == "`0.0001`"
    assert rows["`capo.max_rejection`"] == "`null`"
    assert rows["`capo.kl_budget`"] == "`null`"
    assert not {"`capo.betas`", "`capo.eps`"} & set(rows)  # inside verl these are the optimizer's
