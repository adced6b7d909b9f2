# SPDX-License-Identifier: Apache-2.0
"""Runs of release 0.1, from before its modules moved: checkpoints continue, configurations mean the
same.

``data/release_0_1.tar.gz`` holds, per engine, a checkpoint after two steps of a tiny model, written
at commit e95d3b5, with what that commit reported of the third step (``recorded.json``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import verl  # noqa: F401  plugins first
from hydra.utils import instantiate
from packaging.version import Version

from capo_verl.plugin.policy_loss import CapoPolicyLossConfig
from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.state_cases import resume
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

ARCHIVE = Path(__file__).with_name("data") / "release_0_1.tar.gz"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release_0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


# FSDP's weights are pickled tensors of torch 2.13.
READS_THEM = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="the checkpoint was written by torch 2.13"
)


@pytest.mark.parametrize(
    ("engine", "layout"),
    [("megatron", Layout(tp=2)), pytest.param("fsdp", FsdpLayout(), marks=READS_THEM)],
    ids=["megatron", "fsdp"],
)
def test_a_checkpoint_continues(engine: str, layout: Layout | FsdpLayout, runs: Path) -> None:
    recorded = json.loads((runs / engine / "recorded.json").read_text())
    # The threshold that adapted is found anew: the one that it had reached instead.
    (threshold,) = recorded["metrics"]["capo/policy_threshold"]
    knobs = {**recorded["knobs"], "kl_budget": None, "policy_shift_max": threshold}
    (scale,) = recorded["metrics"]["capo/lr_scale"]
    ranks = run_on_ranks(
        resume, layout.world_size, layout, str(runs / "model"), str(runs / engine), knobs, scale,
        preload=ENGINE_MODULES, timeout=300,
    )  # fmt: skip
    metrics = next(rank["metrics"] for rank in ranks if rank["metrics"])
    expected = {name: values for name, values in recorded["metrics"].items() if "/kl_" not in name}
    assert metrics.keys() == expected.keys() - {"capo/lr_scale", "capo/policy_threshold"}
    for name in metrics:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name
    assert "is of release 0.1: no checksum covers its number of updates, 2" in ranks[0]["said"]


@READS_THEM
def test_its_kl_budget_finds_the_rate_anew(runs: Path) -> None:
    recorded = json.loads((runs / "fsdp" / "recorded.json").read_text())
    layout = FsdpLayout()
    (rank,) = run_on_ranks(
        resume, layout.world_size, layout, str(runs / "model"), str(runs / "fsdp"),
        recorded["knobs"], preload=ENGINE_MODULES, timeout=300,
    )  # fmt: skip
    assert rank["metrics"]["capo/lr"] == [1e-7]
    assert "capo/policy_threshold" not in rank["metrics"]
    assert "holds a threshold of a release before 0.2" in rank["said"]
    assert "or one of a release before 0.2: the learning rate is found anew" in rank["said"]


def test_the_dataclass_is_found_under_its_old_name() -> None:
    block = {"_target_": "capo_verl.config.CapoPolicyLossConfig", "capo": {"preset": "grpo"}}
    config = instantiate(block)
    assert type(config) is CapoPolicyLossConfig and config.capo.policy_shift_max == 1e-4


OLD_NAMES = {
    "capo_verl.rewards.math_answers:compute_score": "capo_verl.data.rewards.math_answers",
    "capo_verl.quickstart.task:compute_score": "capo_verl.data.gym",
    "capo_verl.algorithms.rivals:RIVALS": "capo_verl.rivals",
    "capo_verl.algorithms.rivals:Rival": "capo_verl.rivals",
    "capo_verl.algorithms.rivals:Metrics": "capo_verl.rivals",
    "capo_verl.kl_budget_config:KLBudgetConfig": "capo_verl.config",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_a_name_is_found_where_it_was(old: str) -> None:
    module, name = old.split(":")
    code = f"import {module} as a, {OLD_NAMES[old]} as b; assert a.{name} is b.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_its_entry_point_no_run_with_capo_starts() -> None:
    """An environment that was installed before the entry point moved loads an empty module."""
    code = (
        "import sys; sys.modules['capo_verl.plugin.register'] = None\n"
        "from capo_verl.plugin.state import raise_if_broken\n"
        "del sys.modules['capo_verl.plugin.register']\n"
        "try: raise_if_broken()\nexcept RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "verl has not loaded capo_verl.plugin.register: install capo_verl again (pip install .), "
        "for its entry point\n"
    )
