# SPDX-License-Identifier: Apache-2.0
"""verl chooses its platform once per process, when it is first asked: before any test here imports it."""

from __future__ import annotations

import os

os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.helpers.tiny_model import make_tiny_qwen2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a small Qwen2."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_qwen2(folder)
    return folder
