# SPDX-License-Identifier: Apache-2.0
"""The KL budget inside verl's FSDP engine against a float64 Hugging Face model: both generations,
Ulysses, fused heads.
"""

from __future__ import annotations

import json

import pytest

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.engines.megatron.kl_cases import PROBED, knobs_of, train
from tests.engines.megatron.test_kl_budget import check
from tests.helpers.kl_recording import SGD_LR, record_kl
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.tiny_model import make_tiny_qwen2

LAYOUTS = [
    FsdpLayout(packed=False),
    FsdpLayout(dp=2),
    FsdpLayout("fsdp", 2),
    FsdpLayout(sp=2),
    FsdpLayout("fsdp", sp=2),
    FsdpLayout("fsdp", 2, fused="torch"),
    FsdpLayout("fsdp", sp=2, fused="triton"),
]


@pytest.fixture(scope="module")
def recording(tiny_qwen2):
    return record_kl(tiny_qwen2, PROBED, optimizer="sgd")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout(layout, recording, tiny_qwen2):
    ranks = run_on_ranks(
        train, layout.world_size, layout, tiny_qwen2, knobs_of(), preload=ENGINE_MODULES
    )
    check(ranks, layout.dp, recording, SGD_LR)


@pytest.mark.parametrize(
    "layout", [FsdpLayout(dp=2), FsdpLayout("fsdp", 2), FsdpLayout("fsdp", sp=2)], ids=str
)
def test_line_search_steps_back_to_the_budget(layout, tiny_qwen2):
    """FSDP keeps gathered weights of the root after a forward pass: what is measured again, and
    trained on, is the new ones.
    """
    expected = record_kl(tiny_qwen2, PROBED, optimizer="sgd", line_search=1.2, least=0.3)
    assert sum(step.kept < 0.9 for step in expected.steps) >= 2
    ranks = run_on_ranks(
        train,
        layout.world_size,
        layout,
        tiny_qwen2,
        knobs_of(line_search=1.2, rate_min=0.3),
        preload=ENGINE_MODULES,
    )
    check(ranks, layout.dp, expected, SGD_LR)


def test_dropout_of_the_training_pass_is_no_step(tmp_path):
    """transformers keeps the rate in the configuration; a first step hardly moves the policy."""
    path, layout = make_tiny_qwen2(tmp_path), FsdpLayout()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.5}))
    (rank,) = run_on_ranks(train, 1, layout, path, knobs_of(), preload=ENGINE_MODULES)
    assert rank.reports[0]["capo/kl_mean"][0] < 1e-8 < rank.reports[-1]["capo/kl_mean"][0]
