# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import multiprocessing.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "fuzz", max_examples=5000, deadline=None, print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" not in os.environ:  # whose parent has done this
    # What runs leave in the temporary folder goes with this one at the end: verl's locks of
    # checkpoints, Ray's logs, what killed processes had. pytest's own folders stay where they are.
    # The name is short: the path of a socket is limited to a hundred characters.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="capo_")
    # After multiprocessing's own folder, which is in it (priority -100).
    remove = functools.partial(shutil.rmtree, ignore_errors=True)
    multiprocessing.util.Finalize(None, remove, [tempfile.tempdir], exitpriority=-200)

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
    "cpu/quickstart/test_runner.py", "data/rewards/test_in_ray.py",
    "data/rewards/test_math_answers.py", "data/rewards/test_verdicts.py", "data/test_cache.py",
    "data/test_docs.py", "launch/test_ray_cluster.py", "plugin/test_stop.py",
    "viewer/test_browser.py",
)  # fmt: skip
"""Where tests wait for short real time limits, signals or a browser: nothing else should run beside
them.
"""
RANKS = ("cpu/fsdp/", "cpu/megatron/", "cpu/smollm2/", "engines/fsdp/", "engines/megatron/")
"""Where tests start process groups; elsewhere those that call ``run_on_ranks`` do."""
SLOW = (
    "commands/", "core/kernels/", "cpu/", "docs/test_commands.py", "docs/test_extending.py",
    "docs/test_site.py", "experiments/", "helpers/test_warm.py", "launch/test_launchers.py",
    "launch/test_rollout_options.py", "launch/test_submit.py", "outside_verl/", "packaging/",
)  # fmt: skip
"""Where tests start interpreters, train, or interpret kernels."""
LONG = (
    "slurm/test_interruptions.py", "slurm/", "docs/test_commands.py",
    "engines/megatron/test_layouts.py", "e2e/", "engines/megatron/",
    "data/evaluation/test_generation.py", "engines/fsdp/", "cpu/", "launch/", "packaging/",
    "commands/", "outside_verl/", "experiments/",
)  # fmt: skip
"""What takes longest, in this order: begun first, so that all processes are busy to the end."""


def _starts_ranks(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    return any(name.startswith("run_on_ranks") for name in function.__code__.co_names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {item: item.path.relative_to(here).as_posix() for item in items}
    for item, place in places.items():
        for mark, folders in (("ray", RAY), ("alone", ALONE), ("ranks", RANKS), ("slow", SLOW)):
            if place.startswith(folders):
                item.add_marker(mark)
        if _starts_ranks(item):
            item.add_marker("ranks")

    def rank(item: pytest.Item) -> int:
        return next((i for i, x in enumerate(LONG) if places[item].startswith(x)), len(LONG))

    items.sort(key=rank)  # stable: within a file nothing changes


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
    """Each process takes a file at a time, in our order. Slurm's longest has a cluster of its own;
    the others share one.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            alone = file.endswith("/test_interruptions.py")
            return "slurm" if file.startswith("tests/slurm/") and not alone else file

    config.option.loadscopereorder = False
    return ByFile(config, log)
