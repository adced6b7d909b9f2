# SPDX-License-Identifier: Apache-2.0
"""A tiny random language model with a character-level tokenizer, written to disk.

No network, always the same bits.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from capo_verl.cpu.quickstart.model import build_tokenizer

DEFAULTS: dict[str, dict[str, int]] = {
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
}
"""Keys of an architecture's config that are not the other ones' as well."""


def make_tiny_model(
    path: str | os.PathLike[str],
    model_type: str = "qwen2",
    vocab_size: int = 128,
    hidden_size: int = 64,
    layers: int = 2,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    **sizes: Any,
) -> str:
    """Write a random model of an architecture that Hugging Face knows, four heads over two
    key-value heads unless `sizes` (further keys of its config) says otherwise, float32.

    The weights are spread widely enough for the distributions over tokens to differ clearly from
    uniform, and every norm and bias differs from its initial value, so that a weight that is lost
    or mixed up shows.

    Returns:
        `path` as a string.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(vocab_size)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **DEFAULTS.get(model_type, {}),
            **({"head_dim": hidden_size // 4} if "qwen3" in model_type else {}),
            **sizes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.05 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.05 * noise)
            else:
                parameter.copy_(0.08 * (64 / hidden_size) ** 0.5 * noise)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_tiny_qwen2(
    path: str | os.PathLike[str],
    vocab_size: int = 128,
    hidden_size: int = 64,
    layers: int = 2,
    tie_word_embeddings: bool = False,
) -> str:
    """Write a tiny random Qwen2 and its tokenizer to `path`, and return it.

    See :func:`make_tiny_model`.
    """
    return make_tiny_model(path, "qwen2", vocab_size, hidden_size, layers, tie_word_embeddings)
