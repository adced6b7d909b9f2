# SPDX-License-Identifier: Apache-2.0
"""The KL probe and the routers of a mixture of experts: it leaves their counts alone, and compares
what can be compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.expert_cases import counted, passes_before, refused
from tests.engines.megatron.kl_cases import knobs_of
from tests.engines.megatron.replay_cases import Case
from tests.helpers.recording import PROMPTS, RESPONSES
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

ONE = Case(Layout(), model="experts")


def on_ranks(function, case: Case, *args: Any) -> list[Any]:
    return run_on_ranks(function, case.layout.world_size, case, *args, preload=ENGINE_MODULES)


def test_the_probe_leaves_what_routers_count_alone(models):
    """Losses for balance and their log, tokens per expert; a line search looks several times."""
    case = Case(Layout(dp=2, ep=2), model="experts")
    knobs = knobs_of(line_search=50.0, rate_min=0.3)
    probed = on_ranks(counted, case, models["experts"], knobs, None)
    rates = probed[0][0]
    plain = on_ranks(counted, case, models["experts"], {"mode": "off"}, rates)
    tokens = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    for rank, ((_, ours), (_, theirs)) in enumerate(zip(probed, plain, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
        assert ours["global_load_balancing_loss of the log"].sum() > 0
        # Two experts per token, in three steps.
        trained = 3 * 2 * sum(tokens[4 * rank : 4 * rank + 4])
        assert ours["local_tokens_per_expert of layer 0"].sum() == trained
    assert len(rates) == 3


@pytest.mark.parametrize(
    ("config", "own_pass"),
    [
        ({}, False),
        ({"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0}, True),
        ({"moe_expert_capacity_factor": 2.0}, True),
    ],
    ids=str,
)
def test_routing_that_training_has_for_itself(config, own_pass, models):
    assert on_ranks(passes_before, ONE, models["experts"], config) == [own_pass]


@pytest.mark.parametrize(
    "config", [{"moe_input_jitter_eps": 0.1}, {"moe_router_force_load_balancing": True}], ids=str
)
def test_random_routing_is_refused(config, models):
    ((key, value),) = config.items()
    (said,) = on_ranks(refused, ONE, models["experts"], knobs_of(), config)
    assert said == (
        "capo.kl_budget cannot compare two passes whose routers draw random numbers: drop "
        f"actor_rollout_ref.actor.megatron.override_transformer_config.{key}={value}, or set "
        "kl_budget=null"
    )
    assert on_ranks(refused, ONE, models["experts"], {"mode": "off"}, config) == [""]
