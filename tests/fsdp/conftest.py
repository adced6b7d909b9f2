# SPDX-License-Identifier: Apache-2.0
"""verl chooses its platform once per process, when it is first asked: before any test here imports it."""

import os

import pytest

os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.helpers.tiny_model import make_tiny_qwen2

    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny-qwen2"))
