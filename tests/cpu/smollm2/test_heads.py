# SPDX-License-Identifier: Apache-2.0
"""Added attention heads change nothing: not the log-probs, not the gradients, not a single weight
while training.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from capo_verl.cpu.smollm2.heads import pad_attention_heads
from tests.helpers.tiny_model import make_tiny_model

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 3, 16, 48


def tiny(folder, model_type: str, dtype=torch.float32, **sizes):
    """Random weights; six query heads over three key-value heads, of a size that is not hidden_size
    / heads.
    """
    sizes = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        **sizes,
    }
    path = make_tiny_model(folder, model_type, hidden_size=HIDDEN, **sizes)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )


def real_part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The slice of a padded weight (or gradient) that belongs to the original model."""
    projection = name.split(".")[-2]
    if projection == "o_proj":
        return tensor[:, : HEADS * HEAD_DIM]
    rows = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}.get(projection)
    return tensor if rows is None else tensor[: rows * HEAD_DIM]


def added_part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What :func:`real_part` leaves, flat; empty for weights without heads."""
    real = real_part(name, tensor)
    axis = 1 if name.split(".")[-2] == "o_proj" else 0
    return tensor.narrow(axis, real.shape[axis], tensor.shape[axis] - real.shape[axis]).flatten()


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """Of the tokens that follow, ``[B, L - 1]``."""
    return model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(4, 128, (3, 11), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "llama-tied"])
@pytest.mark.parametrize("multiple", [2, 6])
def test_same_log_probs_same_gradients_and_none_for_the_added_weights(
    tmp_path, ids, model_type, multiple
):
    name, _, tied = model_type.partition("-")
    model = tiny(tmp_path, name, tie_word_embeddings=bool(tied))
    padded = pad_attention_heads(model, multiple)
    kv_heads = {2: 4, 6: 6}[multiple]
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (
        2 * kv_heads,
        kv_heads,
    )
    assert padded.config.head_dim == HEAD_DIM

    expected, got = log_probs(model, ids), log_probs(padded, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    expected.mean().backward()
    got.mean().backward()
    original = dict(model.named_parameters())
    assert [n for n, _ in padded.named_parameters()] == list(original)
    added = 0
    for n, parameter in padded.named_parameters():
        torch.testing.assert_close(
            real_part(n, parameter.grad), original[n].grad, rtol=1e-5, atol=1e-7
        )
        assert original[n].grad.abs().max() > 0
        assert not added_part(n, parameter).any()
        assert not added_part(n, parameter.grad).any()
        added += added_part(n, parameter).numel()
    biases = 4 if name == "qwen2" else 0  # those of q, k and v, in rows
    per_layer = (kv_heads - KV_HEADS) * HEAD_DIM * (6 * HIDDEN + biases)
    assert added == per_layer * model.config.num_hidden_layers


def test_training_with_adam_is_that_of_the_original(tmp_path, ids):
    """In float64, so that different sums of zeros cannot hide a difference; with weight decay."""
    model = tiny(tmp_path, "llama", dtype=torch.float64)
    padded = pad_attention_heads(model, 2)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    for trained in (model, padded):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (-log_probs(trained, ids).mean()).backward()
            optimizer.step()
    original = dict(model.named_parameters())
    assert (model.model.layers[0].self_attn.q_proj.weight - before).abs().max() > 1e-2
    for n, parameter in padded.named_parameters():
        torch.testing.assert_close(real_part(n, parameter), original[n], rtol=0, atol=1e-9)
        assert not added_part(n, parameter).any()


def test_the_padded_model_is_what_is_loaded_again(tmp_path, ids):
    padded = pad_attention_heads(tiny(tmp_path, "llama", tie_word_embeddings=True), 2)
    padded.save_pretrained(tmp_path / "padded")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "padded", dtype=torch.float32
    )
    assert loaded.config.head_dim == HEAD_DIM
    torch.testing.assert_close(log_probs(loaded, ids), log_probs(padded, ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("multiple", [1, 3])
def test_heads_that_divide_are_left_alone(tmp_path, multiple):
    model = tiny(tmp_path, "llama")
    assert pad_attention_heads(model, multiple) is model


def test_what_cannot_be_padded_is_named(tmp_path):
    model = tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match="multiple=0"):
        pad_attention_heads(model, 0)
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="model_type=gpt2: .*llama, qwen2, qwen3"):
        pad_attention_heads(model, 2)


def test_megatron_trains_the_padded_tied_model_as_hugging_face_does(tmp_path):
    """Log-probs, gradient norm and one clipped step at TP2, where three key-value heads could not
    be divided.
    """
    from tests.cpu.hugging_face import check, make_reference
    from tests.cpu.megatron.engine_cases import Layout, measure
    from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

    model = tiny(tmp_path / "original", "llama", tie_word_embeddings=True)
    path = tmp_path / "padded"
    pad_attention_heads(model, 2).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "original").save_pretrained(path)
    original, padded = make_reference(str(tmp_path / "original")), make_reference(str(path))
    assert original.grad_norm == pytest.approx(padded.grad_norm, rel=1e-6)
    layout = Layout(tp=2)
    ranks = run_on_ranks(measure, layout.world_size, layout, str(path), preload=ENGINE_MODULES)
    check(ranks, layout.dp, padded)
