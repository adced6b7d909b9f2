# SPDX-License-Identifier: Apache-2.0
"""The commit of a checkout: a hash, a mark for changes, nothing where there is none."""

from __future__ import annotations

import subprocess

import pytest

from capo_verl.experiments.provenance import commit, processor


@pytest.fixture
def git(tmp_path):
    def run(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    yield run
    commit.cache_clear()


def test_no_repository_and_one_without_a_commit(tmp_path, git):
    assert commit(tmp_path) == ""
    git("init", "-q")
    commit.cache_clear()
    assert commit(tmp_path) == ""


def test_hash_and_mark(tmp_path, git):
    (tmp_path / "capo_verl").mkdir()
    (tmp_path / "capo_verl/a.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    (tmp_path / "notes").write_text("outside the package\n")
    head = git("rev-parse", "HEAD")[:12]
    assert commit(tmp_path) == head
    (tmp_path / "capo_verl/a.py").write_text("a = 2\n")
    commit.cache_clear()
    assert commit(tmp_path) == head + "+"


def test_processor_is_a_name_on_one_line():
    assert (
        processor().strip() == processor() != ""
        and "\n" not in processor()
        and "(R)" not in processor()
    )
