# SPDX-License-Identifier: Apache-2.0
"""The example without a trainer: what it prints, and what it gives the filter."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "transformers", reason="the example uses transformers, which the extras cpu and trl install"
)
from torch.nn.modules.module import register_module_forward_hook
from transformers import Qwen2ForCausalLM

from capo_verl import CapoFilter

SCRIPT = Path(__file__).parents[2] / "examples/outside_verl/plain_pytorch.py"
OFF = ("--policy-shift-max", "0", "--objective-shift-max", "0")


def run(*arguments: str) -> list[dict[str, float]]:
    """What the example prints for each step: name -> number."""
    command = [sys.executable, str(SCRIPT), *arguments]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(re.fullmatch(r"step +\d+  reward .*", line) for line in lines), lines
    return [
        {
            name: float(value)
            for name, value in re.findall(r"([A-Za-z][A-Za-z_ ]*?) +([0-9.e+-]+)(?=  |$)", line)
        }
        for line in lines
    ]


@pytest.fixture(scope="module")
def filtered() -> list[dict[str, float]]:
    return run("--steps", "20")


def test_two_runs_are_equal_and_another_seed_is_not(filtered):
    assert run("--steps", "20") == filtered
    assert run("--steps", "20", "--seed", "1") != filtered


def test_some_tokens_are_rejected(filtered):
    assert [line["step"] for line in filtered] == list(range(20))
    assert 0 < sum(line["rejected"] for line in filtered) / 20 < 0.1
    assert all(line["m_F"] > 0 for line in filtered)


def test_thresholds_which_none_passes():
    assert run("--steps", "1", "--policy-shift-max", "1e-30")[0]["rejected"] == 1
    assert run("--steps", "1", "--objective-shift-max", "1e-30")[0]["rejected"] == 1


def test_without_thresholds_none_is_rejected_and_the_reward_rises():
    lines = run("--steps", "60", *OFF)
    assert [line["rejected"] for line in lines] == [0] * 60
    first, last = (sum(line["reward"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last > first + 0.2


def test_the_budget_sets_the_learning_rate():
    """A step of 128 completions has four times the budget of 32; 19 steps are no full decay."""
    held = run("--steps", "20", "--kl-budget", "1e-3", "--learning-rate", "10", *OFF)
    assert [line["learning rate"] for line in held[:3]] == [1e-7, 1e-6, 1e-5]
    assert held[0]["KL"] < 1e-7
    mean = sum(line["KL"] for line in held[8:14]) / 6
    assert 5e-4 < mean < 8e-3
    assert all(1e-4 < line["learning rate"] < 1e-1 for line in held[8:])


def test_the_filter_is_given_what_the_model_and_the_optimizer_use(monkeypatch):
    """Hidden states and logits are input and output of the LM head, bit for bit, at the places that
    predict the response.
    """
    given, heads, sampled = [], [], []
    evaluate, generate = CapoFilter.evaluate, Qwen2ForCausalLM.generate

    def recorded_evaluate(self, *args):
        given.append((*args, evaluate(self, *args)))
        return given[-1][-1]

    def recorded_generate(self, *args, **kwargs):
        sampled.append((kwargs["temperature"], generate(self, *args, **kwargs)))
        return sampled[-1][1]

    def record_head(module, args, output):
        # The only linear layer with 32 outputs and no bias; generation calls it for one position.
        if (
            isinstance(module, torch.nn.Linear)
            and module.out_features == 32
            and module.bias is None
            and output.shape[1] > 1
        ):
            heads.append((args[0].detach(), output.detach(), module.weight.detach().clone()))

    monkeypatch.setattr(CapoFilter, "evaluate", recorded_evaluate)
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", recorded_generate)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "3"])
    hook = register_module_forward_hook(record_head)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        hook.remove()

    assert len(given) == len(heads) == len(sampled) == 3
    for call, (head_in, head_out, weight), (temperature, tokens) in zip(
        given, heads, sampled, strict=True
    ):
        hidden, logits, actions, advantages, mask, learning_rate, decision = call
        assert torch.equal(hidden, head_in[:, 2:-1]) and torch.equal(
            logits, head_out[:, 2:-1] / temperature
        )
        assert torch.allclose(
            torch.nn.functional.linear(hidden, weight), logits * temperature, rtol=0, atol=1e-6
        )
        assert torch.equal(actions, tokens[:, 3:])
        ends = [row.index(0) if 0 in row else 7 for row in actions.tolist()]
        assert mask.tolist() == [[t <= end for t in range(8)] for end in ends] and min(ends) < 7
        assert advantages.view(16, 8).sum(1).abs().max() < 1e-4 and advantages.abs().max() > 1
        assert learning_rate == 3e-3
        assert not (decision.accepted & ~mask).any()
