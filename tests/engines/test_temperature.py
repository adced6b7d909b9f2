# SPDX-License-Identifier: Apache-2.0
"""Where logits in bfloat16 meet a temperature: the policy that verl's log-probs are of, and what
the filter makes of it, both against float64. ``test_bfloat16.py`` has the same inside the engines.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
import verl  # noqa: F401  plugins first
from torch import Tensor
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.engine.fsdp.transformer_impl import _scale_logits_by_temperature

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import ProjectedLogits
from capo_verl.engines.lm_head import before_each_call, of_fused_linear
from tests.helpers.oracle import Oracle, make_token

N, V, H, TOP_K, LR = 120, 512, 64, 50, 1e-3


class Way(NamedTuple):
    """What verl makes of one batch of tokens, and what it shows the filter."""

    policy: Tensor
    """``[N, V]`` logits after temperature, as verl rounds them."""
    log_probs: Tensor
    logits: Tensor | ProjectedLogits
    """Before temperature."""
    temperatures: Tensor


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, LM head and tokens whose logits are those of a trained model: up to 20."""
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(N, H, generator=generator)).bfloat16()
    head = (torch.randn(V, H, generator=generator) / H**0.5).bfloat16()
    probs = (hidden.double() @ head.double().T).softmax(-1)
    return hidden, head, torch.multinomial(probs, 1, generator=generator)[:, 0]


def not_fused(temperature: float) -> Way:
    hidden, head, actions = batch()
    logits, temperatures = hidden @ head.T, torch.full((N,), temperature)
    policy = _scale_logits_by_temperature(
        logits, temperatures[:, None], is_unit_temperature=temperature == 1
    )
    return Way(policy, logprobs_from_logits(policy, actions), logits, temperatures)


def fused(temperature: float) -> Way:
    hidden, head, actions = batch()
    calls = []
    with before_each_call(FusedLinearForPPO, "forward", of_fused_linear, calls.append):
        log_probs, _ = FusedLinearForPPO()(hidden, head, actions, temperature=temperature)
    (call,) = calls
    return Way((hidden @ head.T) / temperature, log_probs, call.logits(), call.temperatures())


WAYS = pytest.mark.parametrize("way", [not_fused, fused])
TEMPERATURES = pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])


@WAYS
@TEMPERATURES
def test_verls_log_probs_are_of_this_policy(way, temperature):
    made = way(temperature)
    expected = made.policy.double().log_softmax(-1).gather(-1, batch()[2][:, None])[:, 0]
    eps = torch.finfo(made.log_probs.dtype).eps
    torch.testing.assert_close(made.log_probs.double(), expected, rtol=2 * eps, atol=20 * eps)


def policy_shifts(logits: Tensor) -> np.ndarray:
    """m_F of the tokens by the oracle, with advantages of 1."""
    hidden, _, actions = batch()
    oracle = Oracle(V, H, optimizer_model="sgd", top_k=TOP_K)
    given = zip(hidden.double().numpy(), logits.double().numpy(), actions.tolist(), strict=True)
    return np.array([oracle.token_shifts(make_token(*x, 1.0, TOP_K), LR)[1] for x in given])


def deviation(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found - expected) / np.maximum(expected, np.median(expected))


@WAYS
@TEMPERATURES
def test_the_filter_sees_this_policy(way, temperature):
    """To float32, where verl hands it the logits. Of a fused cross-entropy it has the product,
    which verl rounds once more after the division, or (its kernels) not at all: as far apart as
    rounding a logit to bfloat16 makes them, which docs/parallelism.md gives.
    """
    made, (hidden, head, actions) = way(temperature), batch()
    config = CapoConfig(
        top_k=TOP_K, optimizer_model="sgd", policy_shift_max=None, objective_shift_max=None
    )
    ones = torch.ones(N)
    out = CapoFilter(config, V, H).evaluate(
        hidden, made.logits, actions, ones, ones, LR, temperature=made.temperatures
    )
    found = out.policy_shift.double().numpy()
    from_trained = deviation(found, policy_shifts(made.policy))
    from_exact = deviation(found, policy_shifts(hidden.double() @ head.double().T / temperature))
    for apart in (from_trained, from_exact):
        assert apart.max() < 0.15 and np.median(apart) < 0.01
    if way is not_fused or temperature == 1:
        assert from_trained.max() < 1e-5
