# SPDX-License-Identifier: Apache-2.0
"""``+rival=NAME`` on a verl command line, alone and with ``+capo``, and what is refused before
anything starts.
"""

from __future__ import annotations

import pytest
import verl  # noqa: F401  plugins first
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from capo_verl.config import KLBudgetConfig
from capo_verl.config.rivals import RIVAL_SPECS, RivalConfig
from capo_verl.plugin.checks.before_start import check_config

ACTOR = "actor_rollout_ref.actor"
RIVAL = f"{ACTOR}.policy_loss.rival"
BASE = ("model_engine=megatron", f"{ACTOR}.ppo_micro_batch_size_per_gpu=1")


@pytest.fixture(scope="module")
def command_line():
    """Composes verl's config for the given overrides, as its ``main_ppo`` does."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield lambda *overrides: compose("ppo_trainer", overrides=[*BASE, *overrides])


@pytest.mark.parametrize("name", RIVAL_SPECS)
def test_a_rival_needs_no_capo(command_line, name):
    config = command_line(f"+rival={name}")
    check_config(config)
    policy_loss = instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial")
    assert policy_loss.loss_mode == name and policy_loss.capo is None
    assert policy_loss.rival == RivalConfig(name, RIVAL_SPECS[name].knobs())


@pytest.mark.parametrize(
    "overrides",
    [["+rival=dcpo", "+capo=kl_budget"], ["+capo=kl_budget", "+rival=dcpo"]],
    ids=" ".join,
)
def test_a_rival_and_capo_compose_in_either_order(command_line, overrides):
    config = command_line(*overrides, f"{RIVAL}.eps_high=0.5")
    check_config(config)
    policy_loss = instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial")
    assert policy_loss.loss_mode == "dcpo" and policy_loss.rival.knobs.eps_high == 0.5
    assert (policy_loss.capo.mode, policy_loss.capo.kl_budget) == ("off", KLBudgetConfig())


def test_what_a_rival_needs_of_verl_is_set(command_line):
    actor = command_line("+rival=lopti").actor_rollout_ref.actor
    assert actor.ppo_epochs == 2
    assert command_line("+rival=entropy_mask").actor_rollout_ref.actor.calculate_entropy is True
    assert command_line("+rival=gtpo").algorithm.adv_estimator == "grpo"


def test_verl_lacks_these_losses():
    """A name that verl gives away itself one day must not be overwritten in silence."""
    import ast
    import inspect

    from verl.trainer.ppo import core_algos

    decorators = [
        d
        for f in ast.parse(inspect.getsource(core_algos)).body
        if isinstance(f, ast.FunctionDef)
        for d in f.decorator_list
    ]
    names = {
        d.args[0].value
        for d in decorators
        if isinstance(d, ast.Call) and isinstance(d.args[0], ast.Constant)
    }
    assert "cispo" in names and not names & RIVAL_SPECS.keys()
    assert RIVAL_SPECS.keys() <= core_algos.POLICY_LOSS_REGISTRY.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+rival=dcpo", f"{RIVAL}.eps_lo=1"], "rival.eps_lo is not a knob of CAPO. Did you mean "
        "'eps_low'"),
        (["+rival=dcpo", f"{RIVAL}.eps_low=-1"],
            r"rival.eps_low=-1: expected a number in \(0, inf\)"),
        (["+rival=dcpo", f"{RIVAL}.name=ppo"], "rival.name='ppo': expected one of entropy_mask, "
        "lopti"),
        (["+rival=dcpo", f"{ACTOR}.policy_loss.loss_mode=vanilla"],
            r"loss_mode=vanilla: \+rival=dcpo needs loss_mode=dcpo"),
        ([f"+{RIVAL}.name=dcpo"], r"policy_loss.rival is set without the switch; add \+rival=dcpo"),
        (["+rival=entropy_mask", f"{ACTOR}.calculate_entropy=False"], "entropy_mask needs "
        "entropies; set it to True"),
        ([f"{ACTOR}.policy_loss.loss_mode=entropy_mask"], "entropy_mask needs entropies; set it to "
        "True"),
        (["+rival=lopti", f"{ACTOR}.ppo_epochs=3"], "ppo_epochs=3: rival.part=alternate .*; set it "
        "to an even number"),
        (["+rival=gtpo", "trainer.use_v1=False"], "trainer.use_v1=False: rival.name=gtpo"),
        (["+rival=d3s", "trainer.use_v1=False"], "trainer.use_v1=False: rival.name=d3s"),
        (["+rival=gtpo", "algorithm.rollout_correction.bypass_mode=True"], "bypass_mode=True: no "
        "entropies for rival.name=gtpo; set rival.entropy_max to null, or bypass_mode to False"),
        (["+rival=empg", "algorithm.rollout_correction.bypass_mode=True"], "bypass_mode=True: no "
        "entropies for rival.name=empg; set bypass_mode to False"),
        (["+rival=bnpo", "algorithm.adv_estimator=grpo"], "algorithm.adv_estimator=grpo: "
        "rival.name=bnpo normalises rewards itself; set it to reinforce"),
        (["+rival=pacs", f"{ACTOR}.ppo_epochs=2"], "ppo_epochs=2: rival.name=pacs .* one update"),
        (["+rival=pacs", f"{ACTOR}.ppo_mini_batch_size=8"],
            "ppo_mini_batch_size=8: .* one update per batch; set it to 1024"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(command_line, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_config(command_line(*overrides))


def test_lopti_without_alternation_needs_no_second_epoch(command_line):
    check_config(command_line("+rival=lopti", f"{ACTOR}.ppo_epochs=1", f"{RIVAL}.part=high"))
