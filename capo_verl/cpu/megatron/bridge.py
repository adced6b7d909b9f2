# SPDX-License-Identifier: Apache-2.0
"""mbridge's architectures on a CPU: the same Hugging Face weights, in Megatron-Core's own layers.

mbridge builds its layers from Transformer Engine (``mbridge/core/llm_bridge.py:149``), which needs
CUDA. Here they are built from Megatron-Core's local modules; the two layer norms that Transformer
Engine fuses into the linear layers behind them are then modules of their own, and so is each
expert, which is all that changes in the names of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from verl.utils.megatron_utils import unwrap_model

from capo_verl.cpu.megatron.attention import CausalSdpaAttention
from capo_verl.cpu.megatron.experts import GroupedNames
from capo_verl.plugin import compat

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Values of ``model_type`` in Hugging Face configs that run on a CPU.

Another decoder of mbridge: add it and test it.
"""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "use_cpu_initialization": True,
    # Without initialization the tensor-parallel attributes of the weights stay unset, and the
    # gradient norm of TP2 is silently wrong (megatron/core/tensor_parallel/layers.py:245).
    "perform_initialization": True,
    # The kernels behind these exist for CUDA only.
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "persist_layer_norm": False,
    # The others exchange tokens in DeepEP's kernels.
    "moe_enable_deepep": False,
    "moe_token_dispatcher_type": "alltoall",
}
"""Megatron-Core's ``TransformerConfig`` on a CPU, whatever a GPU launcher asks for."""


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm, with sequence parallelism.

    Megatron-Core's wrapper refuses that (``transformer/torch_norm.py:32``).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # finalize_model_grads sums the gradient over the tensor-parallel group where this is set.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron-Core's decoder block without Transformer Engine: our attention, our norms."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CausalSdpaAttention
        for owner, name in (
            (layer.submodules, "input_layernorm"),
            (layer.submodules, "pre_mlp_layernorm"),
            (attention, "q_layernorm"),
            (attention, "k_layernorm"),
        ):
            if getattr(owner, name) not in (None, IdentityOp):
                setattr(owner, name, RMSNorm)
    return block


def make_cpu_bridge(bridge_cls: Any) -> Any:
    """The CPU version of one of mbridge's bridge classes of a decoder."""

    class CpuBridge(bridge_cls):
        _DIRECT_MAPPING: dict[str, str]
        _MLP_MAPPING = {
            **bridge_cls._MLP_MAPPING,
            "pre_mlp_layernorm.weight": [
                "model.layers.{layer_number}.post_attention_layernorm.weight"
            ],
        }
        _OTHER_MAPPING = {
            "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]
        }

        def _adjust_mapping_for_shared_weights(self) -> None:
            # mbridge writes into the class for tied embeddings, and the next untied model would
            # look for no weights.
            self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)
            super()._adjust_mapping_for_shared_weights()

        def _get_gptmodel_args(self) -> dict[str, Any]:
            compat.shim_rope_theta(self.hf_config)
            return super()._get_gptmodel_args()

        def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
            self.has_vp_stage = True
            return local_layer_spec(self.config, vp_stage)

        def get_model(self, *args: Any, **kwargs: Any) -> list[torch.nn.Module]:
            # Megatron refuses a vocabulary that does not divide; mbridge pads it only when told so.
            self.make_vocab_size_divisible_by = mpu.get_tensor_model_parallel_world_size()
            return super().get_model(*args, **kwargs)

        def load_weights(self, models: Any, *args: Any, **kwargs: Any) -> None:
            super().load_weights([GroupedNames(unwrap_model(m)) for m in models], *args, **kwargs)

        def export_weights(self, models: Any) -> Any:
            return super().export_weights([GroupedNames(unwrap_model(m)) for m in models])

    CpuBridge.__name__ = CpuBridge.__qualname__ = f"Cpu{bridge_cls.__name__}"
    CpuBridge._capo_verl_cpu = True
    return CpuBridge


def install_cpu_bridges() -> None:
    """Replace the architectures in mbridge's registry.

    Importing mbridge through verl applies verl's patches to it.
    """
    import verl.models.mcore.mbridge  # noqa: F401
    from mbridge.core.bridge import _MODEL_REGISTRY

    for model_type in ARCHITECTURES:
        if not getattr(_MODEL_REGISTRY[model_type], "_capo_verl_cpu", False):
            _MODEL_REGISTRY[model_type] = make_cpu_bridge(_MODEL_REGISTRY[model_type])
