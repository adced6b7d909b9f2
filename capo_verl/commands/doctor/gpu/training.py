# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine in bfloat16 on one rank, with a model of random weights that is made here:
CAPO's decisions against float64, and what the filter and the KL budget take of an update.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capo_verl.commands.doctor.check import FAIL, OK
from capo_verl.commands.doctor.gpu.rows import Row, judged
from capo_verl.commands.measure.oracle import Oracle, Token, make_token
from capo_verl.commands.measure.targets import share_of_update
from capo_verl.config import verl_knobs
from capo_verl.core.filter import CapoFilter

LEARNING_RATE = 1e-5
STEPS = 3
TOLERANCE = 1e-4
"""Of m_H and m_F as a share of the value or of the median, the larger; of the moments as a share of
the largest: the filter sums in float32.
"""
TIE = 1e-3
"""Distance from the threshold, as a share of it, within which float32 may decide otherwise."""
BUDGET_SHARE = 0.05
"""Of an update that the KL budget may take."""


class BatchSizes(NamedTuple):
    """Of a mini-batch."""

    sequences: int
    prompt: int
    response: int
    micro_batch: int


@dataclass(frozen=True)
class Setting:
    """Sizes on a device; on a GPU the model has those of Qwen2.5-0.5B."""

    model: Mapping[str, int]
    compared: BatchSizes
    """Of the steps that float64 follows."""
    timed: BatchSizes
    """Of the steps that are timed."""


SETTINGS = {
    "cuda": Setting(
        {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
        BatchSizes(8, 16, 32, 4), BatchSizes(64, 64, 192, 8),
    ),
    "cpu": Setting(
        {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2},
        BatchSizes(8, 4, 12, 4), BatchSizes(16, 8, 24, 8),
    ),
}  # fmt: skip


def examine_engine(device: torch.device) -> list[Row]:
    """CAPO in three steps after a first, whose threshold is not known yet."""
    setting = SETTINGS[device.type]
    knobs = {
        **verl_knobs("grpo"),
        "policy_shift_max": {"target_rejection": 0.3, "memory": 0.0},
        "objective_shift_max": None,
    }
    with engine_of(setting, device) as engine:
        loss, steps = _loss(knobs), list[list[Call]]()
        with watched(steps), engine.train_mode():
            for i in range(1 + STEPS):
                steps.append([])
                engine.train_batch(_batch(engine, setting.compared, device, seed=i), loss)
        compared = compare(steps, engine._step.capo)
        # Not watched: what is kept for float64 takes time.
        timed = list(_timed_steps(engine, setting, device, loss))
    share = statistics.median(metrics["capo/filter_seconds"][0] / took for metrics, took in timed)
    message = (
        f"the filter takes {100 * share:.2f} % of the update measured here "
        f"({statistics.median(took for _, took in timed):.3g} s); the target is the 7B model's"
    )
    return [*compared, Row("filter in training", OK, message)]


def examine_budget(device: torch.device) -> list[Row]:
    """The KL budget as its preset has it."""
    setting = SETTINGS[device.type]
    with engine_of(setting, device) as engine:
        loss = _loss(verl_knobs("kl_budget"))
        shares = [
            float(np.mean(metrics["capo/kl_probe_seconds"])) / took
            for metrics, took in _timed_steps(engine, setting, device, loss)
        ]
    verdict = share_of_update("the KL budget's probes", statistics.median(shares), BUDGET_SHARE)
    return [judged("KL budget share", verdict, "; both are measured")]


def _timed_steps(
    engine: Any, setting: Setting, device: torch.device, loss: Any
) -> Iterator[tuple[dict[str, Any], float]]:
    """Metrics and seconds of three steps after one that is not timed."""
    for i in range(1 + STEPS):
        batch = _batch(engine, setting.timed, device, seed=100 + i)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with engine.train_mode():
            metrics = engine.train_batch(batch, loss)["metrics"]
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i:
            yield metrics, time.perf_counter() - began


class Call(NamedTuple):
    """Response tokens of a micro-batch, ``[N, ...]``: what the filter was given, and found."""

    hidden: np.ndarray
    logits: np.ndarray
    actions: np.ndarray
    advantages: np.ndarray
    objective_shift: np.ndarray
    policy_shift: np.ndarray
    accepted: np.ndarray
    learning_rate: float
    threshold: float
    """Infinite where there is none yet."""


@contextmanager
def watched(steps: list[list[Call]]) -> Iterator[None]:
    """Context in which the filter's calls are added to the last step."""
    evaluate = CapoFilter.evaluate

    def evaluated(
        self: CapoFilter, hidden: Any, logits: Any, actions: Any, advantages: Any, mask: Tensor,
        learning_rate: float, **options: Any
    ) -> Any:  # fmt: skip
        out = evaluate(self, hidden, logits, actions, advantages, mask, learning_rate, **options)
        limit = self.policy_shift_max
        kept = mask.bool()
        hidden, logits, actions, advantages, objective, policy, accepted = (
            x[kept].double().cpu().numpy()
            for x in (
                hidden, logits, actions, advantages, out.objective_shift, out.policy_shift,
                out.accepted,
            )
        )  # fmt: skip
        threshold = float("inf") if limit is None else float(limit)
        steps[-1].append(
            Call(hidden, logits, actions, advantages, objective, policy, accepted, learning_rate,
                 threshold)
        )  # fmt: skip
        return out

    CapoFilter.evaluate = evaluated  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        CapoFilter.evaluate = evaluate  # type: ignore[method-assign]


def compare(steps: list[list[Call]], capo: CapoFilter) -> list[Row]:
    """Findings of the filter, beside the oracle that follows its decisions."""
    model: Any = capo.model
    oracle = Oracle(
        capo.shard.vocab_size, capo.hidden_size, top_k=capo.config.top_k, betas=model.betas,
        eps=model.eps,
    )  # fmt: skip
    deviation, wrong, ties, rejected, count = 0.0, 0, 0, 0, 0
    for step in steps:
        accepted: list[Token] = []
        shifts, found = [], []
        for call in step:
            for i, action in enumerate(call.actions.astype(int)):
                token = make_token(
                    call.hidden[i], call.logits[i], action, call.advantages[i], oracle.top_k
                )
                objective, policy = oracle.token_shifts(token, call.learning_rate)
                shifts.append((objective, policy))
                found.append((call.objective_shift[i], call.policy_shift[i]))
                taken = bool(call.accepted[i])
                if abs(policy / call.threshold - 1) < TIE:
                    ties += 1
                else:
                    wrong += taken != (policy < call.threshold)
                rejected += not taken
                count += 1
                if taken:
                    accepted.append(token)
        expected = np.array(shifts)
        floor = np.maximum(np.abs(expected), np.median(np.abs(expected), axis=0))
        deviation = max(deviation, float((np.abs(np.array(found) - expected) / floor).max()))
        oracle.update(accepted)
    state = capo.state_dict()
    moments = max(
        float(np.abs(state[name].double().cpu().numpy() - exact).max() / np.abs(exact).max())
        for name, exact in (("exp_avg", oracle.exp_avg), ("exp_avg_sq", oracle.exp_avg_sq))
    )
    what = f"{len(steps)} steps in bfloat16, {count:,} tokens"
    decided = 0 < rejected < count
    return [
        _within("engine shifts", f"{what}: m_H and m_F", deviation),
        Row(
            "engine decisions",
            OK if decided and not wrong else FAIL,
            f"{what}: {rejected:,} rejected, {wrong} decisions are not those of float64, "
            f"{ties} ties left out" + ("" if decided else "; nothing was decided"),
        ),
        _within("engine moments", f"{what}: the moments", moments),
    ]


def _within(name: str, what: str, deviation: float) -> Row:
    message = f"{what} deviate from float64 by {deviation:.1g} at most (<= {TOLERANCE:g})"
    return Row(name, OK if deviation <= TOLERANCE else FAIL, message)


@contextmanager
def engine_of(setting: Setting, device: torch.device) -> Iterator[Any]:
    """The engine that verl would train with, on a process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            torch.cuda.set_device(0)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield _engine(_write_model(setting, Path(folder, "model")), device)
        finally:
            torch.distributed.destroy_process_group()


def _write_model(setting: Setting, folder: Path) -> str:
    """Random weights, spread wider than a model's are at first, and a small tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from capo_verl.cpu.quickstart.model import build_tokenizer, save

    tokenizer = build_tokenizer()
    config = Qwen2Config(
        **setting.model, tie_word_embeddings=True, initializer_range=0.05, attention_dropout=0.0,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save(model, tokenizer, folder)
    return str(folder)


def _engine(path: str, device: torch.device) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    if device.type == "cpu":
        from capo_verl.cpu.megatron import engine as on_cpu

        on_cpu.ENGINE_CONFIG["dtype"] = "bfloat16"
    else:
        import capo_verl.engines.megatron.engine  # noqa: F401  registers
    model_config = HFModelConfig(path=path, use_remove_padding=True)
    model_config.model_type = "language_model"
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="megatron",
        model_config=model_config,
        engine_config=McoreEngineConfig(use_remove_padding=True),
        optimizer_config=McoreOptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, lr_decay_steps=100, lr_decay_style="constant",
            weight_decay=0.0, clip_grad=1.0, override_optimizer_config={},
        ),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    return engine


def _loss(knobs: Mapping[str, Any]) -> Any:
    """verl's loss as its worker binds it."""
    from verl.workers.config import McoreActorConfig
    from verl.workers.utils.losses import ppo_loss

    from capo_verl.plugin.policy_loss import CapoPolicyLossConfig

    config = McoreActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=CapoPolicyLossConfig(loss_mode="capo", capo=dict(knobs)),
        loss_agg_mode="seq-mean-token-mean",
    )
    return partial(ppo_loss, config=config)


def _batch(engine: Any, sizes: BatchSizes, device: torch.device, seed: int) -> Any:
    """Random sequences, as verl's trainer and worker hand them to the engine."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    count, prompt, response, micro_batch = sizes
    draw = torch.Generator().manual_seed(seed)
    vocab = engine.model_config.hf_config.vocab_size
    ids = torch.randint(4, vocab, (count, prompt + response), generator=draw)
    advantages = torch.randn(count, 1, generator=draw).expand(-1, response)
    old_log_probs = -float(np.log(vocab)) + 0.1 * torch.randn(count, response, generator=draw)
    mask = torch.ones(count, response, dtype=torch.int64)
    fields = {
        "input_ids": ids, "prompts": ids[:, :prompt], "responses": ids[:, prompt:],
        "position_ids": torch.arange(prompt + response).expand_as(ids), "response_mask": mask,
        "loss_mask": mask, "old_log_probs": old_log_probs, "advantages": advantages,
    }  # fmt: skip
    data = tu.get_tensordict(
        {
            name: torch.nested.as_nested_tensor([*rows.to(device)], layout=torch.jagged)
            for name, rows in fields.items()
        },
        {
            "calculate_entropy": False, "global_batch_size": count, "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch, "use_remove_padding": True,
            "use_fused_kernels": False,
        },
    )  # fmt: skip
    tu.assign_non_tensor(data, pad_mode=DatasetPadMode.NO_PADDING, temperature=1.0)
    return data
