# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# verl chooses its platform once per process, when it is first asked: before any test imports it.
os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter then. Triton reads this when it is first imported, by
    # whichever test.
    os.environ["TRITON_INTERPRET"] = "1"

RAY = ("e2e/", "data/evaluation/test_generation.py", "slurm/")
"""Where tests start a Ray of their own, and wait for it most of the time."""
ALONE = (
    "cpu/quickstart/test_runner.py", "data/rewards/", "launch/test_ray_cluster.py",
    "plugin/test_stop.py", "viewer/test_browser.py",
)  # fmt: skip
"""Where tests wait for short real time limits, signals or a browser: nothing else should run beside
them.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here).as_posix()
        if place.startswith(RAY):
            item.add_marker("ray")
        if place.startswith(ALONE):
            item.add_marker("alone")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.helpers.tiny_model import make_tiny_qwen2

    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def tiny_model(tiny_qwen2: str) -> Path:
    """A folder with a small Qwen2."""
    return Path(tiny_qwen2)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of two processes each takes a file at a time; all of Slurm's go to one, for there is one
    cluster.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return ByFile(config, log)
