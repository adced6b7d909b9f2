# SPDX-License-Identifier: Apache-2.0
"""Small runs: two-digit-wide tasks, a warm start of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from capo_verl.experiments.study import warm_start
from capo_verl.experiments.study.config import RunConfig

SMALL: dict[str, Any] = {
    "task": "sort8", "task_knobs": {"digits": 3}, "base": 0.15, "base_kind": "early", "steps": 6,
    "evaluations": 2, "eval_prompts": 64, "hidden": 32, "lr": 1e-3, "kl_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(warm_start.RECIPE, "batch", 64)
    monkeypatch.setitem(warm_start.RECIPE, "check", 128)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warm starts of this session."""
    return tmp_path_factory.mktemp("bases")


def small(**knobs: Any) -> RunConfig:
    return RunConfig(**{**SMALL, **knobs})
