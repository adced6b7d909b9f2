# SPDX-License-Identifier: Apache-2.0
"""Files that other processes read are whole, or as they were, and an error names them."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from capo_verl.utils import replace_text, replacing
from tests.engines.damage_cases import limited


def test_a_disk_without_room_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    replace_text(path, "before")
    with limited(resource.RLIMIT_FSIZE, 100), pytest.raises(OSError, match="state.json") as raised:
        replace_text(path, "x" * 10_000)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_whatever_is_raised_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    replace_text(path, "before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_something_in_the_way_is_named(there: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    if there == "file":
        (tmp_path / "state").write_text("in the way")
        path = path / "state.json"
    else:
        (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=str(path)):
        replace_text(path, "text")
