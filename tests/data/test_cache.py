# SPDX-License-Identifier: Apache-2.0
"""Folders that several builders make at once, and what killed builders leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capo_verl.data import cache
from capo_verl.data.cache import cached_folder, is_complete

RECIPE = {"n": 1}


def build(folder: Path) -> None:
    (folder / "data").write_text("x")


def test_one_that_is_faster_wins(tmp_path):
    """The other's folder appears between the check and the rename."""

    def overtaken(folder: Path) -> None:
        build(folder)
        cached_folder("model", RECIPE, build, tmp_path)

    folder, cached = cached_folder("model", RECIPE, overtaken, tmp_path)
    assert (folder / "data").read_text() == "x" and cached
    assert list(tmp_path.iterdir()) == [folder]


def test_a_damaged_folder_that_appears_meanwhile_is_replaced(tmp_path):
    def beside_a_damaged_one(folder: Path) -> None:
        build(folder)
        target = tmp_path / f"model-{cache.recipe_hash(RECIPE)}"
        target.mkdir()
        (target / "half").write_text("")

    folder, cached = cached_folder("model", RECIPE, beside_a_damaged_one, tmp_path)
    assert is_complete(folder, RECIPE) and not cached


def test_builders_in_lockstep_all_get_the_folder(tmp_path):
    """Processes that build the same folders at the same moments."""
    script = (
        "import sys, time, pathlib; from capo_verl.data.cache import cached_folder, is_complete\n"
        "root, start = pathlib.Path(sys.argv[1]), float(sys.argv[2])\n"
        "for n in range(40):\n"
        "    while time.time() < start + n * 0.05: pass\n"
        "    folder, _ = cached_folder('m', {'n': n}, lambda f: (f / 'x').write_text('x'), root)\n"
        "    assert is_complete(folder, {'n': n})\n"
    )
    start = str(time.time() + 2)
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), start], stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    assert [builder.communicate(timeout=60)[1] for builder in builders] == 3 * [b""]
    assert len(list(tmp_path.iterdir())) == 40


def test_an_error_of_the_file_system_is_raised(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        cached_folder("model", RECIPE, build, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_builder_has_left_is_removed_later(tmp_path):
    name = f".model-{cache.recipe_hash(RECIPE)}"
    dead, alive, other = (tmp_path / n for n in (f"{name}.dead", f"{name}.alive", ".other-1.dead"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "weights").write_text("")
    long_ago = time.time() - cache.ABANDONED_SECONDS - 60
    for path in (dead, dead / "weights", alive, other, other / "weights"):
        os.utime(path, (long_ago, long_ago))
    target, _ = cached_folder("model", RECIPE, build, tmp_path)
    assert set(tmp_path.iterdir()) == {alive, other, target}
