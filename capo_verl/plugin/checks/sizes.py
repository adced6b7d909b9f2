# SPDX-License-Identifier: Apache-2.0
"""Sizes that do not divide.

The one place with the rules of Megatron-Core, verl and the rollout engines about sizes.

Every rule is one that some part of the stack enforces, after minutes of starting up, and says
where. The start-up checks and the plan both ask :func:`problems`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.bridge import lacking
from capo_verl.plugin.checks.model_shape import ModelShape, find_shape
from capo_verl.plugin.checks.run_spec import ACTOR, ROLLOUT, RunSpec, from_config
from capo_verl.plugin.state import on_cpu

MEGATRON = f"{ACTOR}.megatron"
PLANNED = ("megatron", "fsdp", "fsdp2")
"""Values of ``actor.strategy`` whose sizes are known here."""


def check_sizes(config: DictConfig) -> None:
    """Check the sizes of a run, and of its model if that is known.

    Raises:
        ValueError: the first thing that does not divide.
    """
    if OmegaConf.select(config, f"{ACTOR}.strategy") not in PLANNED:
        return
    run = from_config(config, on_cpu())
    try:
        shape = find_shape(run.model)
    except ValueError:  # a model whose sizes mean something else
        shape = None
    for problem in problems(run, shape):
        raise ValueError(problem)


def check_warmup(config: DictConfig) -> None:
    """Check the warm-up, which Megatron asserts after all workers have started.

    (``optimizer_param_scheduler.py:157``)

    Raises:
        ValueError: for a warm-up that is as long as the run.
    """
    steps = OmegaConf.select(config, "trainer.total_training_steps")
    warmup = OmegaConf.select(config, f"{ACTOR}.optim.lr_warmup_steps")
    if (
        OmegaConf.select(config, f"{ACTOR}.strategy") == "megatron"
        and steps
        and (warmup or 0) >= steps
    ):
        raise ValueError(
            f"{ACTOR}.optim.lr_warmup_steps={warmup} must be less than "
            f"trainer.total_training_steps={steps}; lower it, or train longer"
        )


def problems(run: RunSpec, shape: ModelShape | None) -> list[str]:
    """One sentence for each size that does not fit, with the numbers and the keys; empty if all do.

    Args:
        shape: None if the model's sizes are not known; then only what does not depend on them.
    """
    found = list(_positive(run))
    if not found:  # the other rules divide by these
        found += [*_ranks(run), *_batches(run), *_micro_batches(run)]
        if shape is not None:
            found += [*_model(run, shape), *_experts(run, shape), *_rollout_model(run, shape)]
    return found


def _positive(run: RunSpec) -> Iterator[str]:
    sizes = {
        "trainer.nnodes": run.nodes,
        "trainer.n_gpus_per_node": run.gpus_per_node,
        f"{MEGATRON}.tensor_model_parallel_size": run.tp,
        f"{MEGATRON}.pipeline_model_parallel_size": run.pp,
        f"{MEGATRON}.context_parallel_size": run.cp,
        f"{MEGATRON}.expert_model_parallel_size": run.ep,
        f"{MEGATRON}.expert_tensor_parallel_size": run.expert_tp,
        f"{ROLLOUT}.tensor_model_parallel_size": run.rollout_tp,
        f"{ROLLOUT}.pipeline_model_parallel_size": run.rollout_pp,
        f"{ROLLOUT}.data_parallel_size": run.rollout_dp,
        f"{ROLLOUT}.n": run.completions_per_prompt,
        "data.train_batch_size": run.prompts,
        f"{ACTOR}.ppo_mini_batch_size": run.mini_batch,
    }
    for key, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            yield f"{key}={size}: set it to a positive integer"


def _ranks(run: RunSpec) -> Iterator[str]:
    """Ranks that the parallel sizes do not divide.

    ``megatron/core/parallel_state.py`` (initialize_model_parallel),
    ``verl/workers/engine_workers.py:659``.
    """
    total = (
        f"trainer.nnodes={run.nodes} x trainer.n_gpus_per_node={run.gpus_per_node} = {run.world} "
        "GPUs"
    )
    if run.world % run.model_parallel:
        if run.engine == "megatron":
            sizes = (
                f"{MEGATRON}: tensor_model_parallel_size={run.tp} x "
                f"pipeline_model_parallel_size={run.pp} x context_parallel_size={run.cp} = "
                f"{run.model_parallel}"
            )
        else:
            sizes = f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size={run.cp}"
        yield f"{total} do not divide by {sizes}: change one of them"
    elif run.world % (run.expert_ranks * run.pp):
        yield (
            f"{total} do not divide by {MEGATRON}: expert_tensor_parallel_size={run.expert_tp} x "
            f"expert_model_parallel_size={run.ep} x pipeline_model_parallel_size={run.pp} = "
            f"{run.expert_ranks * run.pp}: change one of them"
        )
    if not run.colocated:
        return
    if run.world % run.rollout_ranks:
        yield (
            f"{total} do not divide by {ROLLOUT}: tensor_model_parallel_size={run.rollout_tp} x "
            f"pipeline_model_parallel_size={run.rollout_pp} x data_parallel_size={run.rollout_dp} "
            f"= {run.rollout_ranks}: change one of them"
        )
    elif run.rollout_ranks > run.gpus_per_node and run.rollout_ranks % run.gpus_per_node:
        # verl/workers/rollout/replica.py:113
        yield (
            f"{ROLLOUT}: a replica of {run.rollout_ranks} GPUs does not fill whole nodes of "
            f"trainer.n_gpus_per_node={run.gpus_per_node}: change "
            f"{ROLLOUT}.tensor_model_parallel_size"
        )


def _batches(run: RunSpec) -> Iterator[str]:
    """Batch sizes that do not divide, and mini-batches that are more than the batch.

    ``verl/workers/config/actor.py:225``, ``verl/workers/engine_workers.py:267``,
    ``verl/workers/engine/utils.py:125``.
    """
    # With micro-batches by tokens verl fills the batch up with samples that count for nothing
    # (verl/trainer/ppo/padding_utils.py:144).
    if run.prompts < run.mini_batch and run.tokens_per_gpu is None:
        yield (
            f"data.train_batch_size={run.prompts} prompts are less than one "
            f"{ACTOR}.ppo_mini_batch_size={run.mini_batch}: lower ppo_mini_batch_size"
        )
    if run.dynamic_cp:
        return
    mini, dp = run.mini_batch * run.completions_per_prompt, run.dp
    of_mini = (
        f"{ACTOR}.ppo_mini_batch_size={run.mini_batch} x {ROLLOUT}.n={run.completions_per_prompt} "
        f"= {mini}"
    )
    if mini % dp:
        yield (
            f"{of_mini} completions do not divide by the data-parallel size {dp}: change "
            "ppo_mini_batch_size"
        )
        return
    if run.micro_batch and mini // dp % run.micro_batch:
        yield (
            f"{of_mini} completions on {dp} data-parallel ranks are {mini // dp} each, which do "
            "not divide by "
            f"{ACTOR}.ppo_micro_batch_size_per_gpu={run.micro_batch}: change one of them"
        )
    if run.log_prob_micro_batch and run.colocated and not run.has_critic:
        batch = run.prompts * run.completions_per_prompt
        multiple = math.lcm(dp, mini)  # verl/trainer/ppo/v1/trainer_base.py:1589 pads to it
        each = -(-batch // multiple) * multiple // dp
        if each % run.log_prob_micro_batch:
            yield (
                f"data.train_batch_size={run.prompts} x {ROLLOUT}.n={run.completions_per_prompt} "
                f"completions on {dp} data-parallel ranks are {each} each, which do not divide by "
                f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu={run.log_prob_micro_batch}: change "
                "one of them"
            )


def _micro_batches(run: RunSpec) -> Iterator[str]:
    """Micro-batches that do not hold the longest sequence.

    ``verl/utils/seqlen_balancing.py:384`` asserts it for the lengths that occur, at whichever step
    they do.
    """
    if run.dynamic_cp:  # it has its own scheduler
        return
    longest = (
        f"data.max_prompt_length={run.prompt_length} + "
        f"data.max_response_length={run.response_length} = {run.sequence_length} tokens"
    )
    limits = {
        f"{ACTOR}.ppo_max_token_len_per_gpu": run.tokens_per_gpu,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": run.log_prob_tokens_per_gpu,
    }
    for key, limit in limits.items():
        if limit is not None and limit * run.cp < run.sequence_length:
            spread = f" x {run.cp} context-parallel ranks" if run.cp > 1 else ""
            needed = -(-run.sequence_length // run.cp)
            yield (
                f"{longest} are more than a micro-batch holds, {key}={limit}{spread}: set it to at "
                f"least {needed}"
            )


def _model(run: RunSpec, shape: ModelShape) -> Iterator[str]:
    """Sizes of the model that the parallel sizes do not divide.

    ``megatron/core/transformer/transformer_config.py``, ``megatron/core/tensor_parallel/utils.py``.
    """
    if run.engine != "megatron":
        return
    tp = f"{MEGATRON}.tensor_model_parallel_size={run.tp}"
    sizes = {"attention heads": shape.heads}
    if not shape.experts:
        sizes["rows of the feed-forward layer"] = shape.intermediate
    for what, size in sizes.items():
        if size % run.tp:
            yield f"{shape.name} has {size} {what}, which do not divide by {tp}: choose another"
    if shape.vocab % run.tp and not run.pads_vocab:
        padded = (
            ", or let Megatron-Bridge (vanilla_mbridge=False) pad them with "
            f"+{MEGATRON}.override_transformer_config.should_pad_vocab=True"
        )
        yield (
            f"{shape.name} has {shape.vocab} rows of the vocabulary, which do not divide by {tp}: "
            f"choose another{'' if run.cpu and lacking() else padded}"
        )
    if run.megatron_bridge and shape.tied and run.vpp > 1:
        # _broadcast_shared_embeddings looks for the LM head in the first chunk of the last stage.
        yield (
            f"{shape.name} ties its embeddings, which Megatron-Bridge 0.5 cannot load with "
            f"{MEGATRON}.virtual_pipeline_model_parallel_size={run.vpp}: set it to null, or "
            f"{MEGATRON}.vanilla_mbridge=True"
        )
    if shape.kv_heads % run.tp and run.tp % shape.kv_heads:
        yield (
            f"{shape.name} has {shape.kv_heads} key-value heads, neither a multiple nor a divisor "
            f"of {tp}: choose another"
        )
    if not run.uneven_stages and shape.layers % (run.pp * run.vpp):
        virtual = f" x virtual_pipeline_model_parallel_size={run.vpp}" if run.vpp > 1 else ""
        yield (
            f"{shape.name} has {shape.layers} layers, which do not divide by "
            f"{MEGATRON}.pipeline_model_parallel_size={run.pp}{virtual}: choose another"
        )


def _experts(run: RunSpec, shape: ModelShape) -> Iterator[str]:
    """Sizes of a mixture of experts, and of a model without experts that is told to spread them.

    ``megatron/core/transformer/moe/moe_layer.py:93`` and ``:372``,
    ``megatron/core/transformer/transformer_config.py:1048``.
    """
    if run.engine != "megatron":
        return
    ep, etp = (
        f"{MEGATRON}.expert_model_parallel_size={run.ep}",
        f"{MEGATRON}.expert_tensor_parallel_size={run.expert_tp}",
    )
    if not shape.experts:
        if run.ep > 1:
            yield f"{shape.name} has no experts, but {ep}: set it to 1"
        return
    if shape.experts % run.ep:
        yield (
            f"{shape.name} has {shape.experts} experts, which do not divide by {ep}: choose another"
        )
    if shape.expert_intermediate % run.expert_tp:
        yield (
            f"{shape.name} has {shape.expert_intermediate} rows of an expert, which do not divide "
            f"by {etp}: choose another"
        )
    if run.tp > 1 and not run.sequence_parallel:
        yield (
            f"{shape.name} has experts, which Megatron does not train with "
            f"{MEGATRON}.tensor_model_parallel_size={run.tp} and sequence_parallel=False: set "
            f"{MEGATRON}.sequence_parallel=True"
        )
    if not run.megatron_bridge and (
        (run.ep == 1 and run.expert_tp != run.tp) or (run.tp == 1 and run.expert_tp > 1)
    ):
        # mbridge/core/bridge.py:413 and :853
        yield (
            f"{etp} with tensor_model_parallel_size={run.tp} and expert_model_parallel_size="
            f"{run.ep}: mbridge does not export such experts; set expert_tensor_parallel_size=null"
        )


def _rollout_model(run: RunSpec, shape: ModelShape) -> Iterator[str]:
    """Sizes of the model that vLLM and SGLang refuse.

    (``verify_with_parallel_config`` in ``vllm/config/model.py``)
    """
    if run.rollout in ("vllm", "sglang") and shape.heads % run.rollout_tp:
        yield (
            f"{shape.name} has {shape.heads} attention heads, which do not divide by "
            f"{ROLLOUT}.tensor_model_parallel_size={run.rollout_tp}: choose another"
        )
    # verl/workers/rollout/vllm_rollout/vllm_async_server.py:1107
    if run.rollout == "vllm" and run.max_model_len and 0 < shape.max_positions < run.max_model_len:
        yield (
            f"{ROLLOUT}.max_model_len={run.max_model_len} is more than the {shape.max_positions} "
            f"positions of {shape.name}: lower it"
        )
