# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine on gloo ranks against Hugging Face: log-probs, entropy, weights,
gradients, checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.hugging_face import check, check_resumed, make_reference
from tests.cpu.megatron.engine_cases import (
    LENGTHS,
    Layout,
    counted_tokens,
    make_engine,
    measure,
    save_and_resume,
)
from tests.helpers.grouped import launch_by_size
from tests.helpers.spawn import ENGINE_MODULES, RankError, run_on_ranks
from tests.helpers.tiny_model import make_tiny_model


@dataclass(frozen=True)
class Case:
    """A layout, the model in it, whether activations are recomputed, whether the cross-entropy is
    fused, whether Megatron-Core divides the loss by the tokens (``calculate_per_token_loss``).
    """

    layout: Layout
    model: str = "qwen2"
    recompute: bool = False
    fused: bool = False
    per_token: bool = False

    def __str__(self) -> str:
        options = [name for name in ("recompute", "fused", "per_token") if getattr(self, name)]
        return "-".join([str(self.layout), self.model, *options])

    @property
    def transformer_config(self) -> dict[str, Any]:
        return (RECOMPUTE if self.recompute else {}) | (
            {"calculate_per_token_loss": True} if self.per_token else {}
        )


RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


CASES = [
    Case(Layout()),
    Case(Layout(packed=False)),
    Case(Layout(tp=2)),
    Case(Layout(tp=2, sp=True)),
    Case(Layout(pp=2)),
    Case(Layout(dp=2)),
    Case(Layout(cp=2)),
    Case(Layout(cp=2, packed=False)),
    Case(Layout(tp=2, packed=False)),
    Case(Layout(pp=2, packed=False)),
    Case(Layout(pp=2, vpp=2), model="qwen2-deep"),
    Case(Layout(pp=2), model="qwen2-tied"),
    Case(Layout(tp=2), model="llama"),
    Case(Layout(tp=2), model="qwen3"),
    Case(Layout(tp=2), recompute=True),
    Case(Layout(), fused=True),
    Case(Layout(packed=False), fused=True),  # verl falls back to logits
    Case(Layout(tp=2, sp=True), fused=True),
    Case(Layout(tp=2, sp=True), model="qwen2-tied", recompute=True, fused=True),
    Case(Layout(tp=2, sp=True), model="llama", fused=True),
    Case(Layout(pp=2), model="qwen2-tied", fused=True),
    Case(Layout(pp=2, vpp=2), model="qwen2-deep", fused=True),
    Case(Layout(dp=2), fused=True),
    Case(Layout(cp=2), fused=True),
    Case(Layout(dp=2), per_token=True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {
        "qwen2": {},
        "qwen2-deep": {"layers": 4},
        "qwen2-tied": {"tie_word_embeddings": True},
        "llama": {"model_type": "llama"},
        "qwen3": {"model_type": "qwen3"},
    }
    return {
        name: make_tiny_model(tmp_path_factory.mktemp(name), **options)
        for name, options in made.items()
    }


@pytest.fixture(scope="module")
def measured(request, models):
    def call_of(case: Case) -> tuple:
        return case.layout, models[case.model], case.transformer_config, case.fused

    return launch_by_size(request, measure, call_of)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_hugging_face(case: Case, models, measured) -> None:
    check(measured(case), case.layout.dp, make_reference(models[case.model]))


def test_counting_tokens_over_ranks_leaves_the_batch_as_it_is(tiny_qwen2: str) -> None:
    """verl sums the count in place, and it is a view of the batch."""
    layout = Layout(dp=2)
    ranks = run_on_ranks(counted_tokens, 2, layout, tiny_qwen2, preload=ENGINE_MODULES)
    assert ranks == [(sum(LENGTHS), [*LENGTHS[:2]]), (sum(LENGTHS), [*LENGTHS[2:]])]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        Layout(pp=2),
        Layout(dp=2),
        Layout(dp=2, distributed_optimizer=True),
        Layout(tp=2, distributed_optimizer=True),
    ],
    ids=str,
)
def test_checkpoint(layout: Layout, tiny_qwen2: str, tmp_path) -> None:
    """Loading restores the weights and the optimizer: the step after it repeats the step after
    saving.
    """
    ranks = run_on_ranks(
        save_and_resume,
        layout.world_size,
        layout,
        tiny_qwen2,
        str(tmp_path),
        preload=ENGINE_MODULES,
    )
    check_resumed(ranks)


@pytest.mark.parametrize(
    ("layout", "megatron", "named"),
    [
        (
            Layout(),
            {"lora": {"rank": 8}, "bridge": "mbridge"},
            "actor_rollout_ref.model.lora.rank > 0 without Megatron-Bridge is not supported on the "
            "CPU: set it to 0",
        ),
        (
            Layout(tp=2),
            {"use_fused_kernels": True},
            "actor_rollout_ref.model.use_fused_kernels=True with "
            "actor_rollout_ref.actor.megatron.sequence_parallel=False is not "
            "supported on the CPU: set sequence_parallel=True",
        ),
        (
            Layout(),
            {"use_megatron_fsdp": True},
            "actor_rollout_ref.actor.megatron.use_megatron_fsdp",
        ),
    ],
    ids=["lora", "fused-kernels", "fsdp"],
)
def test_what_a_cpu_cannot_do_is_named(
    layout: Layout, megatron: dict, named: str, tiny_qwen2: str
) -> None:
    with pytest.raises(RankError, match="ValueError") as error:
        run_on_ranks(
            make_engine, layout.world_size, layout, tiny_qwen2, preload=ENGINE_MODULES, **megatron
        )
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "changed", "named"),
    [
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rope_type=linear of the model",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False of the model"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "a model with mlp_only_layers or"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "a model with mlp_only_layers or"),
    ],
)
def test_what_mbridge_would_ignore_is_refused(model_type, changed, named, tmp_path) -> None:
    path = Path(make_tiny_model(tmp_path, model_type)) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(RankError, match=f"{named}.* is not supported on the CPU"):
        run_on_ranks(make_engine, 1, Layout(), str(tmp_path), preload=ENGINE_MODULES)
