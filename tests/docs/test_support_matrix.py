# SPDX-License-Identifier: Apache-2.0
"""docs/support.md says what the start-up checks refuse and which tests exist."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ["VERL_PLATFORM"] = "cpu"

TESTS = Path(__file__).resolve().parents[1]
DOCS = TESTS.parent / "docs"


@pytest.fixture(scope="module")
def matrix():
    sys.path.insert(0, str(DOCS))  # as it is for `python docs/support_matrix.py`
    spec = importlib.util.spec_from_file_location("support_matrix", DOCS / "support_matrix.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_matrix"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["support_matrix"]
    sys.path.remove(str(DOCS))


def test_the_page_is_up_to_date(matrix) -> None:
    assert (DOCS / "support.md").read_text(encoding="utf-8") == matrix.written(), (
        "run python docs/support_matrix.py"
    )


def test_every_test_it_names_exists(matrix) -> None:
    assert matrix.missing_tests(TESTS) == []


def test_a_test_that_does_not_exist_is_found(matrix, monkeypatch) -> None:
    gone = matrix.tested("fsdp/test_engine.py::test_of_last_year")
    monkeypatch.setitem(matrix.ROWS, "Parallelism", {"data": (gone, gone)})
    assert matrix.missing_tests(TESTS) == ["fsdp/test_engine.py::test_of_last_year"]
