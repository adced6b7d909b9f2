# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine on a CPU, registered for the device "cpu" at import.

It serves ``fsdp`` and ``fsdp2``.

Sharded data parallelism over gloo in float32, with Ulysses sequence parallelism and LoRA. torch and
verl need little help here; what a launcher for GPUs asks for and a CPU cannot do is switched off
where nothing is lost by it (bfloat16, offloading, compilation), and refused by name where it would
change the method.

Packed batches need no flash attention: without an attention mask, transformers finds the borders of
the sequences in the position ids (``transformers/masking_utils.py``,
``find_packed_sequence_indices``) and gives SDPA a block-diagonal causal mask. It is dense,
``[tokens, tokens]``, which a GPU run could not afford and a CPU run does. With Ulysses see
``ulysses.py``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import _init_utils
from torch.distributed.tensor import DTensor
from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name
from verl.utils.model import convert_weight_keys
from verl.workers.engine.base import EngineRegistry

from capo_verl.cpu.fsdp import ulysses
from capo_verl.cpu.megatron import linear_cross_entropy
from capo_verl.engines.fsdp.engine import CapoFSDPEngineWithLMHead

if TYPE_CHECKING:  # whatever engine of verl the mixin is put before
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as _Engine
else:
    _Engine = object

logger = logging.getLogger(__name__)

ENGINE_CONFIG: dict[str, Any] = {
    "model_dtype": "fp32",
    "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    "param_offload": False,
    "optimizer_offload": False,
    "offload_policy": False,
    "use_torch_compile": False,
}
"""Settings of ``actor_rollout_ref.actor.fsdp_config`` on a CPU, whatever a launcher asks for."""

BLOCK_MASKED = {"full_attention", "sliding_attention"}
"""Kinds of layers in which transformers separates packed sequences by their position ids."""

SEE_PACKED, SEE_PADDED = ("qwen3_vl",), ("qwen2_5_vl", "qwen2_vl")
"""Types of vision-language models that run on a CPU: in packed batches as well, in padded ones."""


def check_cpu_settings(model_config: Any, engine_config: Any) -> None:
    """Refuse what a CPU cannot do.

    Raises:
        ValueError: naming the key of the config and the value to give it.
    """
    model = "actor_rollout_ref.model"
    hf_config = model_config.hf_config
    sees = hasattr(hf_config, "vision_config")
    other_layers = (
        set(getattr(hf_config.get_text_config(), "layer_types", None) or ()) - BLOCK_MASKED
    )
    refused = [
        (
            bool(other_layers) and model_config.use_remove_padding,
            f"a model with layers of type {', '.join(sorted(other_layers))} in packed batches",
            f"set {model}.use_remove_padding=False",
        ),
        (
            sees and hf_config.model_type not in (*SEE_PACKED, *SEE_PADDED),
            f"the multi-modal model_type={hf_config.model_type}",
            f"use one of {', '.join((*SEE_PACKED, *SEE_PADDED))}, or a text model",
        ),
        (
            hf_config.model_type in SEE_PADDED and model_config.use_remove_padding,
            f"the multi-modal model_type={hf_config.model_type} in packed batches, which verl runs "
            "with flash attention,",
            f"set {model}.use_remove_padding=False",
        ),
        (
            sees and engine_config.ulysses_sequence_parallel_size > 1,
            f"the multi-modal model_type={hf_config.model_type} under Ulysses",
            "set actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=1",
        ),
        (
            engine_config.qat.enable,
            "actor_rollout_ref.actor.fsdp_config.qat.enable=True",
            "set it to False",
        ),
        (
            model_config.use_fused_kernels
            and model_config.fused_kernel_options.get("impl_backend") == "liger",
            f"{model}.fused_kernel_options.impl_backend=liger",
            "set it to torch",
        ),
        (model_config.use_liger, f"{model}.use_liger=True", "set it to False"),
    ]
    for condition, what, instead in refused:
        if condition:
            raise ValueError(f"{what} is not supported on the CPU: {instead}")


def cpu_engine_config(engine_config: Any) -> Any:
    """A copy of verl's ``FSDPEngineConfig`` with what a CPU needs.

    To ``__dict__``, because the dataclass is frozen.
    """
    config = copy.copy(engine_config)
    config.__dict__.update(ENGINE_CONFIG)
    return config


def cpu_model_config(model_config: Any, ulysses_size: int) -> Any:
    """A copy of verl's ``HFModelConfig`` with what a CPU needs.

    Attention runs without flash attention, and LoRA is merged on its way to the rollout.

    The rollout server on a CPU takes full weights; merging into float32 loses nothing.
    """
    config = copy.copy(model_config)
    hf_config = copy.deepcopy(model_config.hf_config)
    if ulysses_size > 1:
        ulysses.install()
        hf_config._attn_implementation = ulysses.ATTENTION
    elif "flash" in (hf_config._attn_implementation or "flash"):
        hf_config._attn_implementation = "sdpa"
    config.__dict__.update(
        hf_config=hf_config,
        enable_activation_offload=False,
        lora={**(model_config.lora or {}), "merge": True},
    )
    return config


def patch_torch() -> None:
    """Let FSDP1 spread rank 0's weights with a broadcast that it allows for accelerators only.

    gloo broadcasts CPU tensors.
    """
    _init_utils._check_module_states_for_sync_module_states = lambda module_states: None


class CpuFsdpMixin(_Engine):
    """Mixin that runs an engine class of verl's FSDP backend on a CPU if put before it."""

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        check_cpu_settings(model_config, engine_config)
        patch_torch()
        linear_cross_entropy.install()
        super().__init__(
            cpu_model_config(model_config, engine_config.ulysses_sequence_parallel_size),
            cpu_engine_config(engine_config),
            optimizer_config,
            checkpoint_config,
        )

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # verl offloads every forward-only model (the reference policy) through pinned memory, which
        # a CPU does not have.
        forward_only = self.engine_config.forward_only
        self.engine_config.__dict__["forward_only"] = False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.__dict__["forward_only"] = forward_only

    def _merged_lora_per_tensor_param(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Merged weights in float32, as the actor has them.

        verl rounds them to bfloat16 (``transformer_impl.py``).
        """
        with merged_lora_context(self.module, backup_adapters=True):
            unwrapped = getattr(self.module, "_fsdp_wrapped_module", self.module)
            params = convert_weight_keys(
                normalize_peft_param_name(self.module.state_dict()), unwrapped
            )
            for name, param in params.items():
                # Cloned, because a plain tensor aliases the weight that is restored when the
                # context ends.
                yield (
                    name,
                    param.full_tensor() if isinstance(param, DTensor) else param.detach().clone(),
                )

    def initialize(self) -> None:
        super().initialize()
        if torch.distributed.get_rank() == 0:
            settings = ", ".join(f"{key}={value}" for key, value in ENGINE_CONFIG.items())
            logger.warning("FSDP runs on the CPU with %s", settings)


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CpuFsdpEngine(CpuFsdpMixin, CapoFSDPEngineWithLMHead):
    """The language model engine of ``capo_verl`` on a CPU."""
