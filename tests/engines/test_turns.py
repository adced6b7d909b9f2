# SPDX-License-Identifier: Apache-2.0
"""What a tool says between two turns is the policy's context, and none of its tokens."""

from __future__ import annotations

import pytest
import torch

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.turns_cases import train
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks


@pytest.mark.parametrize(
    ("layout", "loss_mode"),
    [(FsdpLayout(), "capo"), (FsdpLayout("fsdp", packed=False), "gspo"), (Layout(tp=1), "vanilla")],
    ids=["fsdp2", "fsdp-padded", "megatron"],
)
def test_a_tools_tokens_reach_neither_filter_moments_probe_loss_nor_metrics(
    layout, loss_mode, tiny_qwen2
):
    """Whatever is said of them, bit for bit the same run."""
    clean, spoilt = (
        run_on_ranks(train, 1, layout, tiny_qwen2, poison, loss_mode, preload=ENGINE_MODULES)[0]
        for poison in (False, True)
    )
    first = clean["reports"][0]
    assert 0 < first["capo/rejection_rate"][0] < 1 and first["capo/kl_mean"][0] > 0
    assert str(spoilt["reports"]) == str(clean["reports"])
    for part in ("weights", "state"):
        assert spoilt[part].keys() == clean[part].keys()
        for name, value in clean[part].items():
            assert torch.equal(torch.as_tensor(spoilt[part][name]), torch.as_tensor(value)), name
