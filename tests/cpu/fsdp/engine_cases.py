# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine on one rank: what ``test_fsdp_cpu.py`` and the tests of CAPO under FSDP run on
gloo ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.cpu.megatron.engine_cases import (
    Measured,
    forward,
    measure_engine,
    save_and_resume_engine,
)

MICRO_BATCH_SIZE = 2
"""Sequences that share a packed row, or a padded batch."""


@dataclass(frozen=True)
class FsdpLayout:
    """Generation of FSDP, data-parallel ranks, packed or padded batches, ranks of a shard group
    (-1: all), Ulysses ranks, rank of a fresh LoRA adapter (0: none), backend of the fused
    cross-entropy (empty: not fused).
    """

    strategy: str = "fsdp2"
    dp: int = 1
    packed: bool = True
    fsdp_size: int = -1
    sp: int = 1
    lora_rank: int = 0
    fused: str = ""

    @property
    def world_size(self) -> int:
        return self.dp * self.sp

    def __str__(self) -> str:
        hybrid = f"-of{self.fsdp_size}" if self.fsdp_size > 0 else ""
        ulysses = f"-sp{self.sp}" if self.sp > 1 else ""
        lora = "-lora" if self.lora_rank else ""
        fused = f"-fused-{self.fused}" if self.fused else ""
        return f"{self.strategy}-dp{self.dp}{ulysses}{hybrid}{lora}{fused}" + (
            "" if self.packed else "-padded"
        )


def make_fsdp_engine(
    layout: FsdpLayout,
    model_path: str,
    optimizer: str = "SGD",
    lr: float = 0.5,
    model: dict[str, Any] | None = None,
    **fsdp: Any,
) -> Any:
    """
    Args:
        model: settings of ``HFModelConfig``, such as LoRA's.
        fsdp: settings of ``FSDPEngineConfig``.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    import capo_verl.cpu.fsdp.engine  # noqa: F401  registers

    engine = EngineRegistry.new(
        model_type="language_model",
        backend=layout.strategy,
        model_config=HFModelConfig(
            path=model_path, use_remove_padding=layout.packed,
            **{"use_fused_kernels": bool(layout.fused), "lora_rank": layout.lora_rank,
               "fused_kernel_options": {"impl_backend": layout.fused}, **(model or {})},
        ),
        engine_config=FSDPEngineConfig(
            strategy=layout.strategy, fsdp_size=layout.fsdp_size,
            ulysses_sequence_parallel_size=layout.sp, use_fused_kernels=bool(layout.fused), **fsdp,
        ),
        optimizer_config=FSDPOptimizerConfig(
            optimizer=optimizer, lr=lr, weight_decay=0.0, clip_grad=1.0, total_training_steps=100,
            betas=(0.9, 0.999), override_optimizer_config={},
        ),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    return engine


def measure_fsdp(layout: FsdpLayout, model_path: str, **settings: Any) -> Measured:
    return measure_engine(make_fsdp_engine(layout, model_path, **settings), MICRO_BATCH_SIZE)


def forward_fsdp(
    layout: FsdpLayout, model_path: str, **settings: Any
) -> dict[str, list[torch.Tensor]]:
    return forward(make_fsdp_engine(layout, model_path, **settings), MICRO_BATCH_SIZE)


def save_and_resume_fsdp(
    layout: FsdpLayout, model_path: str, directory: str, **settings: Any
) -> list[dict]:
    return save_and_resume_engine(
        lambda: make_fsdp_engine(layout, model_path, optimizer="AdamW", lr=1e-2, **settings),
        directory,
    )


def write_adapter(model_path: str, directory: str, rank: int = 4) -> str:
    """A LoRA adapter of all linear layers with random factors on disk; its path."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory
