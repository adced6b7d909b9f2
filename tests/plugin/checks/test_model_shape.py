# SPDX-License-Identifier: Apache-2.0
"""Parameter counts against models that transformers instantiates on torch's meta device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from capo_verl.plugin.checks.model_shape import KNOWN, ModelShape, find_shape, from_hf_config

MODEL_TYPE = {
    "qwen2.5": "qwen2",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3": "qwen3",
    "smollm2": "llama",
    "llama": "llama",
}
# Model cards: Qwen2.5-7B 7.61 B (6.53 B without embeddings), Qwen2.5-32B 32.5 B, Qwen3-8B 8.2 B,
# Qwen3-30B-A3B 30.5 B.
PUBLISHED = {
    "Qwen2.5-Math-7B": 7.6e9,
    "Qwen2.5-32B": 32.5e9,
    "Qwen3-8B": 8.2e9,
    "Qwen3-30B-A3B": 30.5e9,
    "SmolLM2-135M": 135e6,
}


def hf_config(shape: ModelShape, **more):
    from transformers import AutoConfig

    kind = next(
        kind for prefix, kind in MODEL_TYPE.items() if shape.name.lower().startswith(prefix)
    )
    experts = (
        {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_intermediate,
        }
        if shape.experts
        else {}
    )
    return AutoConfig.for_model(
        kind, num_hidden_layers=shape.layers, hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab, tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.max_positions, **experts, **more,
    )  # fmt: skip


def count(config) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", KNOWN.values(), ids=lambda shape: shape.name)
def test_parameters_of_known_models(shape):
    config = hf_config(shape)
    assert shape.parameters() == count(config)
    assert from_hf_config(config.to_dict(), shape.name) == shape
    if shape.name in PUBLISHED:
        assert shape.parameters() == pytest.approx(PUBLISHED[shape.name], rel=0.01)


def test_biases_of_llama_are_counted():
    config = hf_config(
        dataclasses.replace(KNOWN["huggingfacetb/smollm2-135m"], layers=2), attention_bias=True
    )
    shape = from_hf_config(config.to_dict(), "biased")
    assert shape.qkv_bias and shape.output_bias
    assert shape.parameters() == count(config)


def test_parts_add_up_to_the_model():
    """Over tensor-parallel ranks and stages, what is not split counted once."""
    shape = KNOWN["qwen/qwen2.5-math-7b"]
    tp, stages = 2, 4
    parts = sum(shape.parameters(tp, stage, stages) for stage in range(stages))
    # Two norms per layer and the final one are on both tensor-parallel ranks.
    norms = (2 * shape.layers + 1) * shape.hidden
    assert tp * parts == shape.parameters() + (tp - 1) * norms


def test_parts_with_experts_add_up_to_the_model():
    """Experts once over eight ranks; the router, on each of four, is counted once."""
    shape, tp = KNOWN["qwen/qwen3-30b-a3b"], 4
    experts = 8 * shape.expert_parameters(8)
    rest = shape.parameters(tp, expert_ranks=8) - experts // 8
    whole = shape.layers * (2 * (shape.hidden + shape.head_dim) + shape.experts * shape.hidden)
    assert tp * rest + experts == shape.parameters() + (tp - 1) * (whole + shape.hidden)


def test_a_tied_head_is_a_second_copy_on_another_stage():
    tied = dataclasses.replace(KNOWN["qwen/qwen2.5-math-7b"], tied=True)
    assert (
        sum(tied.parameters(1, stage, 2) for stage in range(2)) - tied.parameters()
        == tied.vocab * tied.hidden
    )


def test_shapes_are_found(tiny_model, tmp_path):
    assert find_shape("Qwen/Qwen2.5-Math-7B-Instruct").hidden == 3584
    assert find_shape("qwen3-8b").layers == 36
    assert find_shape("somebody/Qwen3-8B") is None  # may be another model
    assert find_shape(str(tiny_model)).heads == 4
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match="model_type=mixtral: only models of these types are"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "mlp_only_layers": [0]}')
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[0\] and decoder_sparse_step=None"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_attention_heads": 4}')
    with pytest.raises(ValueError, match="lacks 'hidden_size'"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        find_shape(str(tmp_path))
