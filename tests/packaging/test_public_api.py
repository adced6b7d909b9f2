# SPDX-License-Identifier: Apache-2.0
"""The public API is what it was recorded to be: a change is seen, named, and made on purpose."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.public_api import RECORDED, UPDATE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "public_api.md"


def difference(recorded: str, found: str) -> str:
    """Only the lines that differ, each with the section it is in."""
    lines = difflib.unified_diff(
        recorded.splitlines(), found.splitlines(), "recorded", "found", n=1, lineterm=""
    )
    return "\n".join(lines)


def test_nothing_has_changed(tmp_path):
    found = (
        tmp_path / "public_api.txt"
    )  # by a process of its own: what other tests have registered must not count
    subprocess.run(
        [sys.executable, "-m", "tests.packaging.public_api", str(found)], cwd=ROOT, check=True
    )
    changed = difference(RECORDED.read_text(), found.read_text())
    if changed:
        pytest.fail(
            f"the public API has changed; if that is meant, run `{UPDATE}` and note it in "
            f"CHANGELOG.md:\n{changed}",
            False,
        )


def test_a_changed_default_is_one_line_out_and_one_in():
    recorded = "[configuration]\nCapoConfig.top_k: int | None = 50\nCapoConfig.eps: float = 1e-08\n"
    assert difference(recorded, recorded) == ""
    assert difference(recorded, recorded.replace("50", "64")).splitlines()[3:] == [
        " [configuration]",
        "-CapoConfig.top_k: int | None = 50",
        "+CapoConfig.top_k: int | None = 64",
        " CapoConfig.eps: float = 1e-08",
    ]


def test_the_page_names_every_public_name():
    names = RECORDED.read_text().split("\n\n")[0].splitlines()
    assert names[0] == "[names]" and "capo_verl.CapoFilter" in names
    assert [name for name in names[1:] if f"`{name}`" not in PAGE.read_text()] == []


def test_update_command_is_the_one_the_page_gives():
    assert UPDATE in PAGE.read_text() and os.access(RECORDED, os.W_OK)
