# SPDX-License-Identifier: Apache-2.0
"""Bytes on one rank: formulas, each with its source. What they make of a run is in
:mod:`capo_verl.launch.plan`.

Narayanan et al. 2021: arXiv 2104.04473. Korthikanti et al. 2022: arXiv 2205.05198.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from capo_verl.config import KLBudgetConfig
from capo_verl.core.kl_budget import KEPT_BYTES
from capo_verl.core.memory import FilterMemory, filter_memory
from capo_verl.plugin.checks.model_shape import ModelShape
from capo_verl.plugin.checks.run_spec import RunSpec

FLOAT32 = 4
ADAM_MOMENTS = 2 * FLOAT32


@dataclass(frozen=True)
class States:
    """State that a rank holds between steps, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    """Adam's moments and, in bfloat16 training, the float32 copy of the parameters."""


def width(run: RunSpec) -> int:
    """Bytes of an activation or a weight: bfloat16, or float32 on a CPU."""
    return FLOAT32 if run.cpu else 2


def states(run: RunSpec, shape: ModelShape, stage: int) -> States:
    """
    Megatron (``megatron/core/distributed/param_and_grad_buffer.py``,
    ``megatron/core/optimizer/distrib_optimizer.py``): bfloat16 parameters and float32 gradients
    (verl's default ``grad_reduce_in_fp32``) whole on every rank; the optimizer's float32 copy and
    moments split over data- and context-parallel ranks by the distributed optimizer, those of
    experts over the ranks that hold the same ones. In float32 training there is no copy.

    FSDP (``verl/workers/engine/fsdp/transformer_impl.py``, ``model_dtype`` fp32): all of it in
    float32, split over all ranks; one layer at a time is gathered, which :func:`gathered_layer`
    counts.
    """
    if run.engine != "megatron":
        share = -(-shape.parameters() // run.world)
        return States(share * FLOAT32, share * FLOAT32, share * ADAM_MOMENTS)
    held = shape.parameters(run.tp, stage, run.pp, run.expert_ranks)
    experts = shape.expert_parameters(run.expert_ranks, run.pp)
    split, expert_split = (run.dp * run.cp, run.expert_dp) if run.distributed_optimizer else (1, 1)
    of_optimizer = -(-(held - experts) // split) + -(-experts // expert_split)
    copy = 0 if run.cpu else FLOAT32
    return States(held * width(run), held * FLOAT32, of_optimizer * (copy + ADAM_MOMENTS))


def gathered_layer(run: RunSpec, shape: ModelShape) -> int:
    """FSDP's working copies: a layer that is computed and one that is fetched, or the LM head,
    which is larger or not.
    """
    if run.engine == "megatron":
        return 0
    layer = shape.layer_parameters() + shape.expert_parameters() // shape.layers
    return 2 * width(run) * max(layer, shape.vocab * shape.hidden)


def layer_activations(run: RunSpec, shape: ModelShape, tokens: int) -> int:
    """Bytes that the backward pass of one layer needs, with flash attention, which keeps no scores.

    Korthikanti et al. 2022 (section 4) count 34 bytes per token and hidden unit for LayerNorm, a
    GELU of width 4h and as many key-value heads as heads. The same count for RMSNorm, SwiGLU and
    grouped queries: the inputs of both norms and of the two column-parallel matrices (4h), queries,
    keys, values and the attention's output, gate, up and their product. Tensor parallelism splits
    all of it if the sequence is split too, and all but the 4h if not.

    With experts a token is copied for each of its own: the copy that is sent, the one that arrives,
    and gate, up and product there (``megatron/core/transformer/moe/token_dispatcher.py``). On
    average as many arrive as are sent, on every rank that shares an expert; a router that prefers a
    rank's experts takes more.
    """
    kept_whole = 4 * shape.hidden
    kept_split = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if shape.experts:
        arriving = run.expert_tp * shape.hidden + 3 * shape.expert_intermediate
        kept_split += shape.experts_per_token * (shape.hidden + arriving)
    else:
        kept_split += 3 * shape.intermediate
    per_token = kept_split / run.tp + kept_whole / (run.tp if run.sequence_parallel else 1)
    return int(tokens * width(run) * per_token)


def activations(run: RunSpec, shape: ModelShape, tokens: int, stage: int) -> int:
    """Bytes of the micro-batches in flight on a stage: ``stages - stage`` of them (1F1B; Narayanan
    et al. 2021, section 2.2).

    Full recomputation in whole layers keeps a layer's input, and all of one layer while that is
    computed again (Korthikanti et al. 2022, section 5). Selective recomputation saves nothing here:
    flash attention keeps no scores.
    """
    layers = -(-shape.layers // run.pp)
    in_flight = run.pp - stage
    if run.vpp > 1:  # interleaved: (p - 1) / (p m) more (Korthikanti et al. 2022, section 4.2.3)
        in_flight = int(in_flight * (1 + (run.pp - 1) / (run.pp * run.vpp)) + 1)
    if run.recompute != "full":
        return in_flight * layers * layer_activations(run, shape, tokens)
    inputs = tokens * shape.hidden * width(run) // (run.tp if run.sequence_parallel else 1)
    return in_flight * layers * inputs + layer_activations(run, shape, tokens)


def logits(run: RunSpec, shape: ModelShape, tokens: int, update: bool) -> int:
    """Bytes of the last stage, for ``tokens`` times this rank's rows of the vocabulary.

    Args:
        update: with gradients; else the log-probabilities, with which verl takes the entropy
            (``trainer_base.py``).

    Megatron hands verl float32 logits of a bfloat16 model (``Float16Module``, ``fp32_output``), and
    its vocabulary-parallel cross-entropy overwrites them with their softmax. The update adds the
    gradient behind the division by the temperature. The entropy takes a copy and a softmax of its
    own (``_lm_head_logits_processor``). In float32, on a CPU, that division changes a view of the
    LM head's output, whose gradient torch then copies.

    FSDP's logits have the dtype of the forward pass. A temperature other than 1 makes a copy. On a
    GPU flash-attention's cross-entropy writes the gradient over the logits, CAPO's penalty adds one
    of its own, and the entropy is compiled; on a CPU torch keeps every step.
    """
    rows, with_entropy = shape.vocab // run.tp, run.keeps_entropy_graph or not update
    if run.fused_head:
        return _fused_logits(run, rows, tokens, update)
    if run.engine == "megatron":
        at_once = 4 if update and run.cpu else 3 if with_entropy else 2
        return tokens * rows * FLOAT32 * at_once
    copy = int(run.temperature != 1)
    if run.cpu:
        at_once = (7 if run.keeps_entropy_graph else 3) if update else 3 + copy
    else:
        at_once = (3 if with_entropy else 1) + copy
        if update and any(map((run.capo or {}).get, ("policy_penalty", "objective_penalty"))):
            at_once = max(at_once, 3)
    return tokens * rows * width(run) * at_once


def _fused_logits(run: RunSpec, rows: int, tokens: int, update: bool) -> int:
    """Bytes of a fused LM head and cross-entropy, whose logits are never whole.

    ``torch`` (``verl/utils/experimental/torch_functional.py``) makes float32 logits of 512 tokens
    at a time; ``triton`` (``verl/utils/kernel/kernels.py``) three sums of every 1,024 rows, and in
    the backward pass the gradients of 9,504 rows, the last block of which it copies.
    """
    if run.fused_head == "torch":
        at_once = (7 if run.keeps_entropy_graph else 5) if update else 3
        return min(tokens, 512) * rows * FLOAT32 * at_once
    if run.cpu:  # blocks that stay in the cache (capo_verl/cpu/megatron/linear_cross_entropy.py)
        return 0
    sums = 3 * FLOAT32 * -(-rows // 1024)
    return tokens * (max(sums, width(run) * (9504 + rows % 9504)) if update else sums)


def capo_filter(run: RunSpec, shape: ModelShape) -> FilterMemory:
    """Bytes of the last stage, for the response tokens of one optimizer step on this rank
    (``capo_verl.core.memory``).
    """
    if run.capo is None or run.capo.get("mode") == "off":
        return FilterMemory(0, 0, 0)
    completions = run.mini_batch * run.completions_per_prompt / run.dp
    limit = run.capo.get("batch_shift_tokens")
    tokens = int(completions * run.response_length / run.cp)
    return filter_memory(
        shape.vocab,
        shape.hidden,
        tokens=tokens,
        tp=run.tp,
        moments_dtype=run.capo["moments_dtype"],
        top_k=run.capo["top_k"] or shape.vocab,
        batch_shift_tokens=tokens if limit is None else limit,
        hidden_bytes=width(run),
    )


@dataclass(frozen=True)
class ProbeMemory:
    """Memory that the KL budget keeps on a rank during an update, in bytes."""

    logits: int
    """Logits of the old policy at the probed tokens, this rank's rows in float32. Last stage."""
    parameters: int
    """Copy, with a line search, of what this rank's optimizer writes to."""


def kl_probe(run: RunSpec, shape: ModelShape, stage: int) -> ProbeMemory:
    """Full-length responses of ``probe_share`` of a rank's samples
    (``capo_verl/engines/kl_probe.py``). k3 keeps no logits.
    """
    budget = None if run.capo is None else run.capo.get("kl_budget")
    if not budget:
        return ProbeMemory(0, 0)
    if not isinstance(budget, Mapping):
        budget = {"delta": budget}
    knobs = KLBudgetConfig(**budget)
    kept = 0
    if knobs.estimator == "exact" and stage == run.pp - 1:
        completions = run.mini_batch * run.completions_per_prompt / run.dp
        tokens = math.ceil(completions * knobs.probe_share) * run.response_length / run.cp
        kept = min(KEPT_BYTES, int(tokens * shape.vocab / run.tp) * FLOAT32)
    copied = 0
    if knobs.line_search is not None:
        copied = states(run, shape, stage).optimizer // (ADAM_MOMENTS + FLOAT32) * FLOAT32
        if run.engine != "megatron" or run.cpu:  # no copy of the parameters beside the moments
            copied = states(run, shape, stage).optimizer // ADAM_MOMENTS * FLOAT32
    return ProbeMemory(kept, copied)


def kv_cache_per_token(run: RunSpec, shape: ModelShape) -> int:
    """Keys and values of one token on one GPU of the rollout engine (Kwon et al. 2023, arXiv
    2309.06180, section 1).

    More GPUs than key-value heads hold copies.
    """
    heads = max(shape.kv_heads // run.rollout_tp, 1)
    return 2 * -(-shape.layers // run.rollout_pp) * heads * shape.head_dim * width(run)


def rollout_weights(run: RunSpec, shape: ModelShape) -> int:
    """Bytes of the weights on the fullest GPU of the rollout engine."""
    last = run.rollout_pp - 1
    experts = run.rollout_ep if run.rollout_ep > 1 else run.rollout_tp
    held = max(
        shape.parameters(run.rollout_tp, stage, run.rollout_pp, experts) for stage in {0, last}
    )
    return held * width(run)


def tokens_of_micro_batch(run: RunSpec, log_prob: bool = False) -> int:
    """Most tokens of a micro-batch on one rank: full-length sequences, spread over the
    context-parallel ranks.
    """
    whole_batch = (
        (run.prompts if log_prob else run.mini_batch) * run.completions_per_prompt / run.dp
    )
    limit = run.log_prob_tokens_per_gpu if log_prob else run.tokens_per_gpu
    completions = (run.log_prob_micro_batch if log_prob else run.micro_batch) or whole_batch
    tokens = -(-min(completions, whole_batch) * run.sequence_length // run.cp)
    return int(min(tokens, limit)) if limit else int(tokens)
