# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine on a CPU, registered for the device "cpu" at import.

Tensor (with or without sequence), pipeline, data and context parallelism over gloo, in float32. A
command line written for GPUs keeps its meaning: what only a GPU can do is switched off where
nothing is lost by it (fusions inside Megatron-Core, bfloat16, offloading), and refused by name
where it would change the method.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from verl.utils.megatron import dist_checkpointing
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron import transformer_impl

from capo_verl.cpu.megatron import distributed_optimizer, experts, linear_cross_entropy
from capo_verl.cpu.megatron.bridge import (
    ARCHITECTURES,
    TRANSFORMER_CONFIG,
    install_cpu_bridges,
    local_layer_spec,
)
from capo_verl.cpu.megatron.grad_clip import install_grad_clip
from capo_verl.cpu.megatron.megatron_bridge import import_megatron_bridge
from capo_verl.cpu.megatron.rng import seed_model_parallel
from capo_verl.cpu.megatron.torch_view import cuda_method_stays, redirect_cuda_to_cpu
from capo_verl.engines.megatron.engine import CapoMegatronEngineWithLMHead
from capo_verl.plugin import compat
from capo_verl.plugin.bridge import is_megatron_bridge

if TYPE_CHECKING:  # whatever engine of verl the mixin is put before
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead as _Engine
else:
    _Engine = object

logger = logging.getLogger(__name__)

ENGINE_CONFIG: dict[str, Any] = {"dtype": "float32"}
"""Settings of ``actor_rollout_ref.actor.megatron`` on a CPU, whatever a launcher asks for."""


def check_cpu_settings(model_config: Any, engine_config: Any) -> None:
    """Refuse what a CPU cannot do.

    Raises:
        ValueError: naming the key of the config and the value to give it.
    """
    megatron = "actor_rollout_ref.actor.megatron"
    hf_config = model_config.hf_config
    model_type = hf_config.model_type
    rope_type = compat.rope_type(hf_config)
    refused = [
        (
            model_type not in ARCHITECTURES,
            f"model_type={model_type}",
            f"use one of {', '.join(ARCHITECTURES)}",
        ),
        # mbridge would ignore these, and the log-probs would be wrong.
        (
            rope_type != "default",
            f"rope_type={rope_type} of the model",
            "use a model without rope scaling",
        ),
        (
            getattr(hf_config, "use_sliding_window", False),
            "use_sliding_window=True of the model",
            "set it to False",
        ),
        (
            not getattr(hf_config, "norm_topk_prob", True),
            "norm_topk_prob=False of the model",
            "use a model whose experts' weights add up to 1",
        ),
        (
            bool(getattr(hf_config, "mlp_only_layers", None))
            or getattr(hf_config, "decoder_sparse_step", 1) != 1,
            "a model with mlp_only_layers or decoder_sparse_step",
            "use one with experts in every layer",
        ),
        (
            engine_config.dynamic_context_parallel,
            f"{megatron}.dynamic_context_parallel=True",
            "set it to False",
        ),
        (engine_config.use_megatron_fsdp, f"{megatron}.use_megatron_fsdp=True", "set it to False"),
        (engine_config.qat.enable, f"{megatron}.qat.enable=True", "set it to False"),
        (
            # verl's own kernels compute each rank's part of the gradient of the hidden states, too;
            # see linear_cross_entropy.py.
            engine_config.use_fused_kernels
            and engine_config.use_remove_padding
            and engine_config.tensor_model_parallel_size > 1
            and not engine_config.sequence_parallel,
            "actor_rollout_ref.model.use_fused_kernels=True with "
            f"{megatron}.sequence_parallel=False",
            "set sequence_parallel=True",
        ),
        (model_config.mtp.enable, "actor_rollout_ref.model.mtp.enable=True", "set it to False"),
        (
            model_config.get("lora", {}).get("rank", 0) > 0
            and not is_megatron_bridge(engine_config.vanilla_mbridge, cpu=True),
            "actor_rollout_ref.model.lora.rank > 0 without Megatron-Bridge",
            "set it to 0",
        ),
    ]
    for condition, what, instead in refused:
        if condition:
            raise ValueError(f"{what} is not supported on the CPU: {instead}")


def cpu_engine_config(engine_config: Any) -> Any:
    """A copy of verl's ``McoreEngineConfig`` with what a CPU needs.

    Written to ``__dict__`` because the dataclass is frozen and accepts bfloat16 and float16 only
    (``verl/workers/config/engine.py:218``).
    """
    config = copy.copy(engine_config)
    megatron_bridge = is_megatron_bridge(engine_config.vanilla_mbridge, cpu=True)
    config.__dict__.update(ENGINE_CONFIG, vanilla_mbridge=not megatron_bridge)
    config.__dict__["override_transformer_config"] = {
        **engine_config.override_transformer_config,
        **TRANSFORMER_CONFIG,
        # mbridge asks its own class (bridge.py).
        **({"transformer_layer_spec": local_layer_spec} if megatron_bridge else {}),
        "sequence_parallel": engine_config.sequence_parallel
        and engine_config.tensor_model_parallel_size > 1,
    }
    return config


def prepare_bridge(engine_config: Any) -> None:
    """Make the bridge that ``cpu_engine_config`` has chosen ready for a CPU.

    Raises:
        ValueError: if Megatron-Bridge cannot be imported.
    """
    if not engine_config.vanilla_mbridge:
        import_megatron_bridge()
    else:
        install_cpu_bridges()
        compat.shim_mbridge()


def _stay(*args: Any, **kwargs: Any) -> None:
    """Moving between host and device: there is nothing to move."""


def patch_verl() -> None:
    """Names that verl's engine looks up in its own modules."""
    for name in (
        "load_megatron_model_to_gpu",  # verl/utils/megatron_utils.py:827
        "load_megatron_optimizer",
        "offload_megatron_model_to_cpu",
        "offload_megatron_optimizer",
    ):
        setattr(transformer_impl, name, _stay)
    # Loading with more than one data-parallel rank exchanges tensors after `.cuda()`
    # (megatron/core/dist_checkpointing/exchange_utils.py:336); here every rank reads what it needs.
    dist_checkpointing.FullyParallelLoadStrategyWrapper = lambda strategy, group: strategy
    linear_cross_entropy.install_in_megatron()


class CpuMegatronMixin(_Engine):
    """Mixin that runs an engine class of verl's Megatron backend on a CPU if put before it."""

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        check_cpu_settings(model_config, engine_config)
        self._given_engine_config = engine_config
        engine_config = cpu_engine_config(engine_config)
        compat.import_checkpoint_modules()
        experts.install()
        prepare_bridge(engine_config)
        install_grad_clip()
        redirect_cuda_to_cpu()
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _init_device_mesh(self) -> None:
        super()._init_device_mesh()
        seed_model_parallel(self.engine_config.seed)

    def _maybe_enable_fused_kernels(self) -> None:
        super()._maybe_enable_fused_kernels()
        # verl switches them off for padded batches, in the config that its worker reads as well;
        # ours is a copy.
        self._given_engine_config.use_fused_kernels = self.engine_config.use_fused_kernels

    def _build_optimizer(self) -> Any:
        with distributed_optimizer.cuda_type_names():
            optimizer = super()._build_optimizer()
        distributed_optimizer.start_adam(optimizer)
        return optimizer

    def _routed_num_tokens(self, data: Any) -> torch.Tensor:
        # Of a packed batch it is a view of the offsets. verl sums it over the ranks in place, on a
        # GPU in the copy that `.to(device)` makes there.
        return super()._routed_num_tokens(data).clone()

    def forward_step(self, *args: Any, **kwargs: Any) -> Any:
        with cuda_method_stays():
            return super().forward_step(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with cuda_method_stays():
            super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with cuda_method_stays(), distributed_optimizer.loading(self.optimizer):
            super().load_checkpoint(*args, **kwargs)

    def initialize(self) -> None:
        with cuda_method_stays():
            super().initialize()
        redirect_cuda_to_cpu()  # building the model imports further modules
        if torch.distributed.get_rank() == 0:
            names = ("vanilla_mbridge", *ENGINE_CONFIG)
            settings = ", ".join(f"{name}={getattr(self.engine_config, name)}" for name in names)
            logger.warning("Megatron runs on the CPU with %s", settings)


patch_verl()


@EngineRegistry.register(model_type="language_model", backend="megatron", device="cpu")
class CpuMegatronEngine(CpuMegatronMixin, CapoMegatronEngineWithLMHead):
    """The language model engine of ``capo_verl`` on a CPU."""
