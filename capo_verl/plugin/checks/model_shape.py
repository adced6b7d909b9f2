# SPDX-License-Identifier: Apache-2.0
"""Shapes of decoder models, and the parameters that a rank of a layout holds.

Covers what Llama, Qwen2 and Qwen3 have in common: grouped-query attention, SwiGLU, RMSNorm, rotary
embeddings; and Qwen3's mixtures of experts, which have a router and experts in every layer. Counts
are exact; the tests compare them with models instantiated on torch's meta device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, named as in its ``config.json`` where that has a name for them."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    """True if the LM head is the embedding (``tie_word_embeddings``)."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection: Llama's ``attention_bias`` means both."""
    qk_norm: bool = False
    max_positions: int = 0
    """0: not known."""
    experts: int = 0
    """Of a layer (``num_experts``); 0 for a dense model."""
    experts_per_token: int = 0
    expert_intermediate: int = 0
    """``moe_intermediate_size``"""

    def layer_parameters(self, tp: int = 1) -> int:
        """Parameters of one layer on one tensor-parallel rank, without those of its experts.

        Matrices are split; norms, the output's bias and the router are not.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        split = (queries + 2 * keys) * (self.hidden + self.qkv_bias) + queries * self.hidden
        if not self.experts:
            split += 3 * self.hidden * self.intermediate
        whole = 2 * self.hidden + self.qk_norm * 2 * self.head_dim + self.output_bias * self.hidden
        return split // tp + whole + self.experts * self.hidden

    def expert_parameters(self, ranks: int = 1, stages: int = 1) -> int:
        """Parameters of the experts on one rank, of one pipeline stage; by default of the model.

        Args:
            ranks: over which those of a layer are spread, whole or in parts.
        """
        layers = -(-self.layers // stages)
        return layers * 3 * self.experts * self.hidden * self.expert_intermediate // ranks

    def parameters(
        self, tp: int = 1, stage: int = 0, stages: int = 1, expert_ranks: int | None = None
    ) -> int:
        """Parameters of one rank in ``tp``, of pipeline stage ``stage``; by default of the model.

        Experts are spread over ``expert_ranks``, by default over ``tp``. The embedding is on the
        first stage, the final norm and the LM head on the last. A tied LM head is a copy of the
        embedding there, if that is not the same stage (``megatron/core/models/gpt/gpt_model.py``).
        """
        rows = self.vocab // tp * self.hidden
        first, last = stage == 0, stage == stages - 1
        head = last and (not self.tied or not first)
        layers = -(-self.layers // stages)
        experts = self.expert_parameters(expert_ranks or tp, stages)
        return (
            layers * self.layer_parameters(tp)
            + first * rows + last * self.hidden + head * rows + experts
        )  # fmt: skip


KNOWN: dict[str, ModelShape] = {
    f"{owner}/{shape.name}".lower(): shape
    for owner, shape in (
        (
            "Qwen",
            ModelShape(
                "Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, True, True, max_positions=32768
            ),
        ),
        (
            "Qwen",
            ModelShape(
                "Qwen2.5-Math-1.5B",
                28,
                1536,
                12,
                2,
                128,
                8960,
                151936,
                True,
                True,
                max_positions=4096,
            ),
        ),
        (
            "Qwen",
            ModelShape(
                "Qwen2.5-Math-7B",
                28,
                3584,
                28,
                4,
                128,
                18944,
                152064,
                False,
                True,
                max_positions=4096,
            ),
        ),
        (
            "Qwen",
            ModelShape(
                "Qwen2.5-7B", 28, 3584, 28, 4, 128, 18944, 152064, False, True, max_positions=32768
            ),
        ),
        (
            "Qwen",
            ModelShape(
                "Qwen2.5-32B", 64, 5120, 40, 8, 128, 27648, 152064, False, True, max_positions=32768
            ),
        ),
        (
            "Qwen",
            ModelShape(
                "Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True, max_positions=32768
            ),
        ),
        (
            "Qwen",
            ModelShape(
                "Qwen3-30B-A3B",
                48,
                2048,
                32,
                4,
                128,
                6144,
                151936,
                qk_norm=True,
                max_positions=32768,
                experts=128,
                experts_per_token=8,
                expert_intermediate=768,
            ),
        ),
        (
            "HuggingFaceTB",
            ModelShape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, True, max_positions=8192),
        ),
        (
            "meta-llama",
            ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, max_positions=131072),
        ),
    )
}
"""Shapes from ``config.json`` on the hub.

``-Instruct`` and ``-Base`` have the same sizes; of their ``max_position_embeddings`` the smaller is
taken.
"""


def from_hf_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a Hugging Face configuration describes.

    Args:
        config: the contents of a Hugging Face ``config.json``.

    Raises:
        ValueError: for a model that is not one of ``MODEL_TYPES``, or lacks a key.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES or config.get("mlp_bias"):
        raise ValueError(
            f"{name} has model_type={kind}: only models of these types are planned: "
            f"{', '.join(MODEL_TYPES)}"
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{name} has mlp_only_layers={config.get('mlp_only_layers')} and decoder_sparse_step="
            f"{config.get('decoder_sparse_step')}: only models with experts in every layer are "
            "planned"
        )
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        attention_bias = bool(config.get("attention_bias", False))
        return ModelShape(
            name=name,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or attention_bias,
            output_bias=kind != "qwen2" and attention_bias,
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            max_positions=config.get("max_position_embeddings") or 0,
            **(_experts(config) if kind == "qwen3_moe" else {}),
        )
    except KeyError as e:
        raise ValueError(f"config.json of {name} lacks {e}") from None


def _experts(config: Mapping[str, Any]) -> dict[str, int]:
    """
    Raises:
        KeyError: for a key that is missing.
    """
    # transformers 5 writes the second name.
    number = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    return {
        "experts": number,
        "experts_per_token": config["num_experts_per_tok"],
        "expert_intermediate": config["moe_intermediate_size"],
    }


def find_shape(model: str) -> ModelShape | None:
    """The shape of a model; None if it is not known.

    It is found for a local folder with a ``config.json``, a model in Hugging Face's cache, or a
    known name.

    Returns:
        None if it is none of them.

    Raises:
        ValueError: for a ``config.json`` that cannot be used.
    """
    path = local_config(model)
    if path is not None:
        try:
            return from_hf_config(json.loads(path.read_text(encoding="utf-8")), Path(model).name)
        except (OSError, json.JSONDecodeError) as e:
            raise ValueError(f"{path} cannot be read: {e}") from None
    name = model.lower().removesuffix("-instruct").removesuffix("-base")
    if "/" in name:
        return KNOWN.get(name)
    return next((shape for known, shape in KNOWN.items() if known.split("/")[1] == name), None)


def local_config(model: str) -> Path | None:
    """The ``config.json`` of a model folder, or of a model in Hugging Face's cache; else None."""
    path = Path(model).expanduser() / "config.json"
    if path.is_file():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # not the name of a model on the hub
        return None
    return Path(cached) if isinstance(cached, str) else None
