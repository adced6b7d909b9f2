# SPDX-License-Identifier: Apache-2.0
"""The sizes of a run that the plan and the start-up checks read in verl's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.bridge import is_megatron_bridge

ACTOR, MODEL, ROLLOUT = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.model",
    "actor_rollout_ref.rollout",
)


@dataclass(frozen=True)
class RunSpec:
    """Plain sizes. Parallel sizes default to 1, batches to those of a single completion."""

    model: str = ""
    engine: str = "megatron"
    """``megatron``, ``fsdp`` or ``fsdp2`` (``actor.strategy``)."""
    cpu: bool = False
    """The embedded default for CPUs: float32, nothing is offloaded, one rollout server."""

    nodes: int = 1
    gpus_per_node: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    """Ranks of context parallelism; with FSDP, of Ulysses' sequence parallelism."""
    ep: int = 1
    """Ranks over which the experts of a layer are spread."""
    etp: int | None = None
    """Ranks over which the matrices of an expert are split; None: as many as ``tp``."""
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    megatron_bridge: bool = False
    """True if Megatron-Bridge loads and exports the weights, not mbridge."""
    pads_vocab: bool = False
    """True if the vocabulary is padded to a multiple of ``tp``.

    Only Megatron-Bridge does it, with ``override_transformer_config.should_pad_vocab``.
    """
    uneven_stages: bool = False
    """True if Megatron was told how to split the layers.

    The plan's even split is then an approximation.
    """

    prompts: int = 1
    """``data.train_batch_size``"""
    completions_per_prompt: int = 1
    mini_batch: int = 1
    """``actor.ppo_mini_batch_size``, in prompts."""
    prompt_length: int = 512
    response_length: int = 1024
    micro_batch: int | None = None
    """Completions per micro-batch and rank; None with ``use_dynamic_bsz``."""
    log_prob_micro_batch: int | None = None
    tokens_per_gpu: int | None = None
    """``ppo_max_token_len_per_gpu``; None without ``use_dynamic_bsz``."""
    log_prob_tokens_per_gpu: int | None = None
    dynamic_cp: bool = False
    """``megatron.dynamic_context_parallel``.

    Ranks share sequences by length, and batches have other sizes.
    """
    has_critic: bool = False
    keeps_entropy_graph: bool = False
    """True if the update takes the entropy: ``entropy_coeff`` or ``calculate_entropy``."""
    fused_head: str = ""
    """Backend of ``use_fused_kernels``, ``torch`` or ``triton``: the logits are never whole.

    Empty without.
    """
    temperature: float = 1.0
    """``rollout.temperature``, by which the trainer divides the logits."""

    recompute: str = "none"
    """``none``, ``selective`` or ``full``, in whole layers."""
    offload_parameters: bool = False
    offload_optimizer: bool = False

    rollout: str = "vllm"
    rollout_tp: int = 1
    rollout_pp: int = 1
    rollout_dp: int = 1
    rollout_ep: int = 1
    """``rollout.expert_parallel_size``; 1: an expert is split over ``rollout_tp``."""
    rollout_memory: float = 0.5
    """``gpu_memory_utilization``"""
    colocated: bool = True
    """True if the rollout engine runs on the trainer's GPUs (verl's mode ``sync``)."""
    rollout_sleeps: bool = True
    """``free_cache_engine``: the engine gives its memory back while the actor trains."""
    kv_cache_bytes: int | None = None
    """``engine_kwargs.vllm.kv_cache_memory_bytes``, of a rank of vLLM's; None: unknown."""
    max_model_len: int | None = None
    sync_bucket_bytes: int = 2048 << 20

    capo: Mapping[str, Any] | None = field(default=None)
    """Knobs of CAPO; None without it.

    Read are ``mode``, ``moments_dtype``, ``top_k``, ``batch_shift_tokens`` and ``kl_budget``.
    """

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def model_parallel(self) -> int:
        """Ranks over which one copy of the model, and one sequence, is spread."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Data-parallel size, rounded down; whether it divides is ``layout.problems``' question."""
        return max(self.world // self.model_parallel, 1)

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def expert_ranks(self) -> int:
        """Ranks over which the experts of a layer are spread, whole or in parts."""
        return self.ep * self.expert_tp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same part of the experts, rounded down like ``dp``."""
        return max(self.world // (self.expert_ranks * self.pp), 1)

    @property
    def rollout_ranks(self) -> int:
        """Ranks of one rollout replica."""
        return self.rollout_tp * self.rollout_pp * self.rollout_dp

    @property
    def sequence_length(self) -> int:
        return self.prompt_length + self.response_length


def from_config(config: DictConfig, cpu: bool) -> RunSpec:
    """The sizes in verl's configuration.

    Args:
        config: verl's whole configuration.
        cpu: whether ``VERL_PLATFORM=cpu`` selects the embedded CPU default.
    """

    def value(path: str, default: Any = None) -> Any:
        found = OmegaConf.select(config, path)
        return default if found is None else found

    kv_cache = value(f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes")
    engine = value(f"{ACTOR}.strategy", "")
    megatron = engine == "megatron"
    part = f"{ACTOR}.megatron" if megatron else f"{ACTOR}.fsdp_config"
    override = f"{part}.override_transformer_config"
    dynamic = bool(value(f"{ACTOR}.use_dynamic_bsz"))
    fused_head = value(f"{MODEL}.fused_kernel_options.impl_backend", "torch")
    if megatron:  # which takes them for packed batches only
        fused_head = "triton" if value(f"{MODEL}.use_remove_padding") else ""
    checkpointing = "full" if value(f"{MODEL}.enable_gradient_checkpointing") else "none"
    split_by_hand = (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    capo = value(f"{ACTOR}.policy_loss.capo")
    megatron_bridge = megatron and is_megatron_bridge(value(f"{part}.vanilla_mbridge", False), cpu)
    return RunSpec(
        model=str(value(f"{MODEL}.path", "")),
        engine=engine,
        cpu=cpu,
        nodes=value("trainer.nnodes", 1),
        gpus_per_node=value("trainer.n_gpus_per_node", 1),
        tp=value(f"{part}.tensor_model_parallel_size", 1) if megatron else 1,
        pp=value(f"{part}.pipeline_model_parallel_size", 1) if megatron else 1,
        vpp=value(f"{part}.virtual_pipeline_model_parallel_size", 1) if megatron else 1,
        cp=value(f"{part}.context_parallel_size", 1)
        if megatron
        else max(
            value(f"{part}.ulysses_sequence_parallel_size", 1),
            value(f"{ACTOR}.ulysses_sequence_parallel_size", 1),
        ),
        ep=value(f"{part}.expert_model_parallel_size", 1) if megatron else 1,
        etp=value(f"{part}.expert_tensor_parallel_size") if megatron else None,
        sequence_parallel=bool(value(f"{part}.sequence_parallel", False)),
        distributed_optimizer=bool(value(f"{part}.use_distributed_optimizer", True)),
        megatron_bridge=megatron_bridge,
        pads_vocab=megatron_bridge and bool(value(f"{override}.should_pad_vocab")),
        uneven_stages=any(value(f"{override}.{key}") for key in split_by_hand),
        prompts=value("data.train_batch_size", 1),
        completions_per_prompt=value(f"{ROLLOUT}.n", 1),
        mini_batch=value(f"{ACTOR}.ppo_mini_batch_size", 1),
        prompt_length=value("data.max_prompt_length", 512),
        response_length=value("data.max_response_length", 512),
        micro_batch=None if dynamic else value(f"{ACTOR}.ppo_micro_batch_size_per_gpu"),
        log_prob_micro_batch=None
        if dynamic
        else value(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu"),
        tokens_per_gpu=value(f"{ACTOR}.ppo_max_token_len_per_gpu") if dynamic else None,
        log_prob_tokens_per_gpu=value(f"{ROLLOUT}.log_prob_max_token_len_per_gpu")
        if dynamic
        else None,
        dynamic_cp=bool(value(f"{part}.dynamic_context_parallel")),
        has_critic=bool(value("critic.enable", value("algorithm.adv_estimator") == "gae")),
        keeps_entropy_graph=bool(value(f"{ACTOR}.entropy_coeff", 0))
        or bool(value(f"{ACTOR}.calculate_entropy")),
        fused_head=fused_head if value(f"{MODEL}.use_fused_kernels") else "",
        temperature=value(f"{ROLLOUT}.temperature", 1.0),
        recompute=value(f"{override}.recompute_granularity", "none") if megatron else checkpointing,
        offload_parameters=not cpu and bool(value(f"{part}.param_offload")),
        offload_optimizer=not cpu and bool(value(f"{part}.optimizer_offload")),
        rollout=value(f"{ROLLOUT}.name", ""),
        rollout_tp=value(f"{ROLLOUT}.tensor_model_parallel_size", 1),
        rollout_pp=value(f"{ROLLOUT}.pipeline_model_parallel_size", 1),
        rollout_dp=value(f"{ROLLOUT}.data_parallel_size", 1),
        rollout_ep=value(f"{ROLLOUT}.expert_parallel_size", 1),
        rollout_memory=value(f"{ROLLOUT}.gpu_memory_utilization", 0.5),
        colocated=bool(
            value("trainer.use_v1", True) and value("actor_rollout_ref.hybrid_engine", True)
        ),
        rollout_sleeps=bool(value(f"{ROLLOUT}.free_cache_engine", True)),
        kv_cache_bytes=kv_cache if isinstance(kv_cache, int) else None,  # vLLM reads 1G as well
        max_model_len=value(f"{ROLLOUT}.max_model_len"),
        sync_bucket_bytes=value(
            f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 2048
        )
        << 20,
        capo=None
        if capo is None
        else cast("Mapping[str, Any]", OmegaConf.to_container(capo, resolve=True)),
    )
