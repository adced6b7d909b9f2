# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine on gloo ranks against Hugging Face: log-probs, entropy, weights, gradients, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cpu.engine_cases import Layout, make_engine, measure, save_and_resume
from tests.cpu.hugging_face import Reference, check, largest_difference, make_reference
from tests.helpers.spawn import RankError, run_on_ranks

PRELOAD = ("torch", "verl.workers.engine.megatron.transformer_impl", "capo_verl.cpu.bridge")
LAYOUTS = [
    Layout(),
    Layout(packed=False),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(dp=2),
    Layout(cp=2),
    Layout(tp=2, packed=False),
    Layout(pp=2, packed=False),
]


@pytest.fixture(scope="module")
def reference(tiny_qwen2: str) -> Reference:
    return make_reference(tiny_qwen2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_hugging_face(layout: Layout, tiny_qwen2: str, reference: Reference) -> None:
    check(run_on_ranks(measure, layout.world_size, layout, tiny_qwen2, preload=PRELOAD), layout.dp, reference)


def test_recomputation_changes_nothing(tiny_qwen2: str, reference: Reference) -> None:
    override = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layout = Layout(tp=2)
    ranks = run_on_ranks(measure, 2, layout, tiny_qwen2, override_transformer_config=override, preload=PRELOAD)
    check(ranks, layout.dp, reference)


def test_interleaved_pipeline(tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_qwen2

    path, layout = make_tiny_qwen2(tmp_path, layers=4), Layout(pp=2)
    ranks = run_on_ranks(measure, 2, layout, path, virtual_pipeline_model_parallel_size=2, preload=PRELOAD)
    check(ranks, layout.dp, make_reference(path))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2-tied"])
def test_other_architectures(model_type: str, tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_model

    name, _, tied = model_type.partition("-")
    path = make_tiny_model(tmp_path, name, tie_word_embeddings=bool(tied))
    layout = Layout(pp=2) if tied else Layout(tp=2)
    check(run_on_ranks(measure, layout.world_size, layout, path, preload=PRELOAD), layout.dp, make_reference(path))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=str)
def test_checkpoint(layout: Layout, tiny_qwen2: str, tmp_path) -> None:
    """Loading restores the weights and the optimizer: the step after it repeats the step after saving."""
    ranks = run_on_ranks(save_and_resume, layout.world_size, layout, tiny_qwen2, str(tmp_path), preload=PRELOAD)
    for saved, later, loaded, again in ranks:
        assert largest_difference(saved, later) > 1e-3
        assert largest_difference(saved, loaded) == 0.0
        assert largest_difference(later, again) == 0.0


@pytest.mark.parametrize(
    ("layout", "megatron", "named"),
    [
        (Layout(cp=2, packed=False), {}, "use_remove_padding=True"),
        (Layout(), {"use_fused_kernels": True}, "actor_rollout_ref.model.use_fused_kernels"),
        (Layout(), {"use_megatron_fsdp": True}, "actor_rollout_ref.actor.megatron.use_megatron_fsdp"),
    ],
    ids=["padded-cp", "fused-kernels", "fsdp"],
)
def test_what_a_cpu_cannot_do_is_named(layout: Layout, megatron: dict, named: str, tiny_qwen2: str) -> None:
    with pytest.raises(RankError, match="ValueError") as error:
        run_on_ranks(make_engine, layout.world_size, layout, tiny_qwen2, preload=PRELOAD, **megatron)
    assert named in str(error.value)


def test_rope_scaling_is_refused(tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_qwen2

    path = Path(make_tiny_qwen2(tmp_path)) / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(config))
    with pytest.raises(RankError, match="rope_type=linear of the model is not supported on the CPU"):
        run_on_ranks(make_engine, 1, Layout(), str(tmp_path), preload=PRELOAD)
