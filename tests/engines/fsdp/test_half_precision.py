# SPDX-License-Identifier: Apache-2.0
"""The KL budget with FSDP in bfloat16: the LM head's weight is read while it is whole."""

from __future__ import annotations

import pytest

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.engines.megatron.half_precision_cases import measured
from tests.engines.megatron.test_half_precision import check_exact, check_fallen_back
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.tiny_model import make_tiny_qwen2


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen2(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (FsdpLayout(dp=2), "tiny_qwen2"),
        (FsdpLayout("fsdp", 2), "tiny_qwen2"),
        (FsdpLayout(dp=2, packed=False), "tied"),
        (FsdpLayout("fsdp", sp=2), "tied"),
    ],
    ids=str,
)
def test_logits_are_computed_again_in_float32(layout, model, request):
    path = request.getfixturevalue(model)
    check_exact(
        run_on_ranks(measured, layout.world_size, layout, path, preload=ENGINE_MODULES),
        reporting=layout.dp,
    )


def adapted_head(layout: FsdpLayout, path: str) -> dict:
    return measured(layout, path, model={"target_modules": ["lm_head", "q_proj"]})


def test_an_adapter_on_the_lm_head(tiny_qwen2):
    """At first it adds nothing, and the logits alone would not tell."""
    layout = FsdpLayout("fsdp", 2, lora_rank=4)
    check_fallen_back(
        run_on_ranks(adapted_head, layout.world_size, layout, tiny_qwen2, preload=ENGINE_MODULES)
    )
