# SPDX-License-Identifier: Apache-2.0
"""Refusals of runs in which CAPO cannot work, one sentence each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from capo_verl.config import PRESETS, CapoConfig, parse_knobs
from capo_verl.core.penalty import penalises
from capo_verl.plugin.checks.run_spec import ACTOR, MODEL
from capo_verl.plugin.hydra_groups import POLICY_LOSS, TARGETS
from capo_verl.plugin.state import raise_if_broken

logger = logging.getLogger(__name__)

ENGINES = ("megatron", "fsdp", "fsdp2")
"""Values of ``actor.strategy`` whose engines have the filter."""
FUSED_BACKENDS = ("torch", "triton")
"""Values of ``fused_kernel_options.impl_backend`` with which the filter was tested; FSDP only,
Megatron has one.
"""
SEQUENCE_SPLITTERS = (
    "megatron.context_parallel_size",
    "fsdp_config.ulysses_sequence_parallel_size",
    "ulysses_sequence_parallel_size",
)
"""Keys of the actor that spread a sequence over ranks."""
OUT_OF_REACH = ("optimizer_cpu_offload", "use_precision_aware_optimizer")
"""Settings of Megatron's optimizer with which its float32 parameters are not where a line search
could change them.
"""
CAPTURED = "optimizer_cuda_graph"
"""The setting of Megatron's optimizer that makes its Adam capturable: a CUDA graph reads the
learning rate from where it was when the graph was captured.
"""


def check_capo(config: DictConfig) -> None:
    """Check what verl's whole config says about CAPO; nothing if it is not switched on.

    Raises:
        ValueError: for invalid knobs or a combination that is not supported, saying what to set.
        RuntimeError: if the plugin is not registered properly.
    """
    knobs = OmegaConf.select(config, f"{POLICY_LOSS}.capo")
    if knobs is None:
        return
    raise_if_broken()
    capo = parse_knobs(knobs)
    if OmegaConf.select(config, f"{POLICY_LOSS}._target_") not in TARGETS:
        raise ValueError(
            f"{POLICY_LOSS}.capo is set without the switch; add "
            f"+capo={knobs.get('preset') or 'grpo'}"
        )
    _check_supported(config)
    _check_kl_budget(config, capo)
    if capo.mode != "off":
        _check_filter(config, capo)
    if knobs.get("preset"):
        _warn_of_another_variant(config, knobs.preset)


def _check_supported(config: DictConfig) -> None:
    """Settings of verl beside which CAPO does not work, whatever its knobs."""
    megatron = OmegaConf.select(config, f"{ACTOR}.strategy") == "megatron"
    dtype = (
        f"{ACTOR}.megatron.dtype"
        if megatron
        else f"{ACTOR}.fsdp_config.mixed_precision.param_dtype"
    )
    refused: list[tuple[str, Callable[[Any], bool], str]] = [
        (
            f"{ACTOR}.strategy",
            lambda x: x not in ENGINES,
            "set model_engine=megatron or model_engine=dp",
        ),
        *_refused_with_fused_kernels(config),
        (f"{ACTOR}.megatron.dynamic_context_parallel", bool, "set it to False"),
        (f"{ACTOR}.megatron.use_megatron_fsdp", bool, "set it to False"),
        (
            f"{MODEL}.mtp.enable_train",
            bool,
            "its extra heads share the output layer; set it to False",
        ),
        (
            dtype,
            lambda x: x in ("fp16", "float16"),
            "its loss scaler skips optimizer steps that CAPO would count; set it to bf16",
        ),
        ("distillation.enabled", bool, "distillation replaces the policy loss; set it to False"),
        ("trainer.use_v1", lambda x: x is False, "set it to True"),
        (
            f"{POLICY_LOSS}.loss_mode",
            lambda x: x == "bypass_mode",
            "choose its inner loss directly",
        ),
    ]
    for path, is_refused, instead in refused:
        found = OmegaConf.select(config, path)
        if is_refused(found):
            raise ValueError(f"CAPO does not support {path}={found}: {instead}")


def _check_filter(config: DictConfig, capo: CapoConfig) -> None:
    """Check the conditions of the curvature."""
    if OmegaConf.select(config, f"{MODEL}.lora.rank") or OmegaConf.select(
        config, f"{MODEL}.lora_rank"
    ):
        logger.warning(
            "with LoRA the LM head is not trained; CAPO's m_H and m_F describe the step as if it "
            "were, so the paper's thresholds need not fit: measure with +capo=track first"
        )
    optimizer = OmegaConf.select(config, f"{ACTOR}.optim.optimizer")
    if capo.optimizer_model == "adam" and "adam" not in str(optimizer).lower():
        raise ValueError(
            f"{POLICY_LOSS}.capo.optimizer_model=adam models Adam, but "
            f"{ACTOR}.optim.optimizer={optimizer}; set capo.optimizer_model=sgd or use Adam"
        )
    for path in SEQUENCE_SPLITTERS:
        if (OmegaConf.select(config, f"{ACTOR}.{path}") or 1) > 1 and capo.stages != ("token",):
            raise ValueError(
                f"{POLICY_LOSS}.capo.granularity={capo.granularity} needs whole sequences on a "
                f"rank; with {ACTOR}.{path} > 1 set it to token"
            )
    for name in ("policy_penalty", "objective_penalty") if penalises(capo) else ():
        _check_penalty(config, name, getattr(capo, name))


def _warn_of_another_variant(config: DictConfig, preset: str) -> None:
    resolved = OmegaConf.create(
        {"expected": PRESETS[preset].verl, "data": OmegaConf.select(config, "data")}
    )
    variant: Any = OmegaConf.to_container(resolved, resolve=True)
    for path, expected in variant["expected"].items():
        found = OmegaConf.select(config, path)
        if found != expected:
            logger.warning(
                "+capo=%s is defined with %s=%s, but the command line says %s, which wins: this is "
                "not the paper's variant any more", preset, path, expected, found,
            )  # fmt: skip


def _check_kl_budget(config: DictConfig, capo: CapoConfig) -> None:
    """Check the conditions of the control of the learning rate."""
    budget = capo.kl_budget
    if budget is None or OmegaConf.select(config, f"{ACTOR}.strategy") != "megatron":
        return
    override = f"{ACTOR}.optim.override_optimizer_config"
    if OmegaConf.select(config, f"{override}.{CAPTURED}"):
        raise ValueError(
            f"{POLICY_LOSS}.capo.kl_budget.delta={budget.delta} cannot scale the learning rate "
            f"with {override}.{CAPTURED}=True, whose Adam does not see a rate that was replaced; "
            "set it to False, or kl_budget=null"
        )
    for key in OUT_OF_REACH if budget.line_search is not None else ():
        if OmegaConf.select(config, f"{override}.{key}"):
            raise ValueError(
                f"{POLICY_LOSS}.capo.kl_budget.line_search={budget.line_search} cannot step "
                f"back with {override}.{key}=True, which "
                "keeps the parameters elsewhere; set it to False, or line_search=null"
            )


def _check_penalty(config: DictConfig, name: str, value: float) -> None:
    """Check the conditions of a penalty, a function of the logits of whole sequences."""
    fused = f"{MODEL}.use_fused_kernels"
    if not value:
        return
    if OmegaConf.select(config, fused):
        raise ValueError(
            f"{POLICY_LOSS}.capo.{name}={value} needs the logits, which {fused}=True never makes; "
            "set one of them to 0 or False"
        )
    for path in SEQUENCE_SPLITTERS:
        split = OmegaConf.select(config, f"{ACTOR}.{path}") or 1
        if split > 1:
            raise ValueError(
                f"{POLICY_LOSS}.capo.{name}={value} needs whole sequences on a rank; with "
                f"{ACTOR}.{path}={split} set it to 0, or that to 1"
            )


def _refused_with_fused_kernels(config: DictConfig) -> list[tuple[str, Callable[[Any], bool], str]]:
    """Settings that do not go together with ``use_fused_kernels=True``: key, values of it, what to
    do instead.
    """
    if not OmegaConf.select(config, f"{MODEL}.use_fused_kernels"):
        return []
    if OmegaConf.select(config, f"{ACTOR}.strategy") != "megatron":
        backend = f"{MODEL}.fused_kernel_options.impl_backend"
        return [
            (
                backend,
                lambda x: x not in FUSED_BACKENDS,
                "set it to torch or triton, or use_fused_kernels=False",
            )
        ]
    sharded = (OmegaConf.select(config, f"{ACTOR}.megatron.tensor_model_parallel_size") or 1) > 1
    packed = OmegaConf.select(config, f"{MODEL}.use_remove_padding")  # otherwise verl does not fuse
    return [
        (
            f"{ACTOR}.megatron.sequence_parallel",
            lambda x: bool(sharded and packed and not x),
            "with use_fused_kernels=True and tensor parallelism verl leaves each rank its own part "
            "of the gradient of the "
            "hidden states, which only sequence parallelism adds up; set it to True",
        )
    ]
