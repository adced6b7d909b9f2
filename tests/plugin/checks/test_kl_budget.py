# SPDX-License-Identifier: Apache-2.0
"""``+capo=kl_budget`` on a verl command line: what it means, and what of it is refused before
anything starts.
"""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from capo_verl.config import KLBudgetConfig
from capo_verl.plugin.checks.before_start import check_config

BUDGET = "actor_rollout_ref.actor.policy_loss.capo.kl_budget"
BASE = ("+capo=kl_budget", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1")


@pytest.fixture(scope="module")
def command_line():
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield lambda *overrides: compose("ppo_trainer", overrides=[*BASE, *overrides])


@pytest.mark.parametrize("engine", ["megatron", "dp"])
def test_the_preset_controls_the_learning_rate_and_nothing_else(command_line, engine):
    config = command_line(
        f"model_engine={engine}", f"{BUDGET}.delta=2e-4", f"{BUDGET}.estimator=k3"
    )
    check_config(config)
    capo = instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial").capo
    assert capo.mode == "off" and capo.kl_budget == KLBudgetConfig(delta=2e-4, estimator="k3")


def test_without_the_filter_any_optimizer_and_layout_will_do(command_line):
    """What is refused for the curvature's sake is not refused without it."""
    check_config(
        command_line(
            "model_engine=megatron", "actor_rollout_ref.actor.optim.optimizer=sgd",
            "actor_rollout_ref.actor.megatron.context_parallel_size=2", "trainer.n_gpus_per_node=2",
        )
    )  # fmt: skip
    filtering = "actor_rollout_ref.actor.policy_loss.capo.mode=filter"
    with pytest.raises(ValueError, match="optimizer_model=adam models Adam"):
        check_config(
            command_line(
                "model_engine=megatron", "actor_rollout_ref.actor.optim.optimizer=sgd", filtering
            )
        )


@pytest.mark.parametrize("key", ["optimizer_cpu_offload", "use_precision_aware_optimizer"])
def test_line_search_needs_the_parameters_at_hand(command_line, key):
    override = f"+actor_rollout_ref.actor.optim.override_optimizer_config.{key}=True"
    check_config(command_line("model_engine=megatron", override))
    with pytest.raises(ValueError, match=f"line_search=2.0 cannot step back with .*{key}=True"):
        check_config(command_line("model_engine=megatron", override, f"{BUDGET}.line_search=2.0"))


MODE = "actor_rollout_ref.actor.policy_loss.capo.mode"
CAPTURED = "actor_rollout_ref.actor.optim.override_optimizer_config.optimizer_cuda_graph"


@pytest.mark.parametrize("more", [[], [f"{BUDGET}.line_search=2.0"]], ids=str)
def test_a_captured_step_does_not_see_the_scaled_rate(command_line, more):
    with pytest.raises(ValueError) as refusal:
        check_config(command_line("model_engine=megatron", f"+{CAPTURED}=True", *more))
    assert str(refusal.value) == (
        f"{BUDGET}.delta=0.002 cannot scale the learning rate with {CAPTURED}=True, whose Adam "
        "does not see a rate that was replaced; set it to False, or kl_budget=null"
    )


@pytest.mark.parametrize(
    "overrides",
    [[f"+{CAPTURED}=False"], [f"+{CAPTURED}=True", f"{BUDGET}=null", f"{MODE}=filter"]],
    ids=str,
)
def test_a_captured_step_is_accepted_where_nobody_scales_the_rate(command_line, overrides):
    check_config(command_line("model_engine=megatron", *overrides))
