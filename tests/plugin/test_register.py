# SPDX-License-Identifier: Apache-2.0
"""Registration with verl: what it adds, and that a failure does not stay silent."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import numpy as np
import pytest
import torch


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize("platform", ["cpu", "nvidia"])
def test_capos_engines_win(platform):
    code = (
        "import verl; from verl.workers.engine import EngineRegistry;print([[c.__name__ for c in "
        "EngineRegistry.get_engine_cls('language_model', backend).__mro__] for backend in "
        "('megatron', 'fsdp', 'fsdp2')])"
    )
    override = (
        {"VERL_PLATFORM": "cpu"}
        if platform == "cpu"
        else {"VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
    )
    result = python(code, **{"VERL_PLATFORM": "", **override})
    assert result.returncode == 0, result.stderr[-2000:]
    megatron, *fsdp = ast.literal_eval(result.stdout.splitlines()[-1])
    assert "CapoMegatronEngineWithLMHead" in megatron and ("CpuMegatronEngine" in megatron) == (
        platform == "cpu"
    )
    for classes in fsdp:
        assert "CapoFSDPEngineWithLMHead" in classes and ("CpuFsdpEngine" in classes) == (
            platform == "cpu"
        )


@pytest.mark.parametrize(
    "first",
    [
        "engines.megatron.engine",
        "cpu.megatron.engine",
        "engines.fsdp.engine",
        "cpu.fsdp.engine",
        "engines.fsdp.packing",
        "engines.megatron.packing",
    ],
)
def test_our_engines_may_be_imported_before_verls(first):
    code = (
        f"import verl, importlib; importlib.import_module('capo_verl.{first}')\n"
        "from verl.workers.engine import EngineRegistry; from capo_verl.plugin import state\n"
        "state.raise_if_broken()\n"
        "print([EngineRegistry.get_engine_cls('language_model', b).__module__ for b in "
        "('megatron', 'fsdp2')])"
    )
    result = python(code, VERL_PLATFORM="cpu")
    assert "['capo_verl.cpu.megatron.engine', 'capo_verl.cpu.fsdp.engine']" in result.stdout, (
        result.stderr[-2000:]
    )


BREAK = (
    "import importlib, sys;"
    "sys.modules['capo_verl.plugin.losses'] = None;"  # the import fails, whatever the reason
)


def test_a_broken_registration_is_logged_and_stops_a_capo_run():
    code = BREAK + (
        "import verl, verl.trainer.ppo.core_algos\n"
        "from capo_verl.config import CapoPolicyLossConfig\n"
        "try:\n    CapoPolicyLossConfig(capo={})\nexcept RuntimeError as e:\n    print('REFUSED', "
        "e)"
    )
    result = python(code, VERL_PLATFORM="cpu")
    assert (
        "ERROR" in result.stderr
        and "capo_verl could not register its policy losses and advantage estimators"
        in result.stderr
    )
    assert (
        "REFUSED capo_verl could not register with verl (policy losses and advantage estimators: "
        in result.stdout
    )


def test_metric_names_survive_verls_renaming():
    import verl  # noqa: F401
    from verl.utils.py_functional import rename_dict

    assert rename_dict({"capo/rejection_rate": 1, "loss": 2, "actor/x": 3}, "actor/") == {
        "capo/rejection_rate": 1, "actor/loss": 2, "actor/x": 3,
    }  # fmt: skip


def test_reinforce_advantage_is_the_reward_itself():
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rewards = torch.tensor([[0.0, 0.0, 1.5], [0.0, -0.5, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages, returns = get_adv_estimator_fn("reinforce")(
        token_level_rewards=rewards, response_mask=mask, config=None, index=np.array(["a", "a"])
    )
    assert advantages.tolist() == [[1.5, 1.5, 1.5], [-0.5, -0.5, 0.0]]
    assert torch.equal(advantages, returns)


def test_capo_loss_divides_each_sequence_by_its_accepted_tokens():
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    old = torch.tensor([[-1.0, -2.0, -1.0], [-0.5, -0.5, -3.0], [-1.0, -1.0, -1.0]])
    log_prob = (
        old + torch.tensor([[0.1, 0.0, -0.2], [0.0, 0.3, 0.0], [0.5, 0.5, 0.5]])
    ).requires_grad_()
    advantages = torch.tensor([[1.0], [-2.0], [3.0]]).expand(3, 3)
    accepted = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    loss, metrics = get_policy_loss_fn("capo")(old, log_prob, advantages, accepted)
    expected = np.mean(
        [-(np.exp(0.1) + np.exp(-0.2)) / 2, 2 * np.exp(0.3)]
    )  # no size of a global batch: 2 sequences count
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert not log_prob.grad[~accepted].any()
    assert float(log_prob.grad[1, 1]) == pytest.approx(2 * np.exp(0.3) / 2, rel=1e-6)
    assert metrics["actor/ppo_kl"] == pytest.approx(-(0.1 - 0.2 + 0.3) / 3, rel=1e-5)
