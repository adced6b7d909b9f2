# SPDX-License-Identifier: Apache-2.0
"""CAPO training steps on one rank: what the tests run on gloo ranks, and the batch that every
layout of every engine gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tests.cpu.megatron.engine_cases import Layout, export, make_engine, set_temperature
from tests.helpers.recording import RecordedBatch

PROMPTS, RESPONSES = (4, 3, 5, 4), (9, 7, 11, 3)
ADVANTAGES = (1.2, -0.7, 0.4, -1.1)
LR, CLIP, STEPS = 1e-2, 1.0, 3
KNOBS: dict[str, Any] = {"top_k": 20, "policy_shift_max": 0.0915, "objective_shift_max": None}


def recorded() -> RecordedBatch:
    """Four sequences and the (stale) log-probs of their responses."""
    generator = torch.Generator().manual_seed(3)
    ids = [
        torch.randint(4, 100, (p + r,), generator=generator)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    return RecordedBatch(
        ids,
        PROMPTS,
        [torch.full((r,), advantage) for r, advantage in zip(RESPONSES, ADVANTAGES, strict=True)],
        [torch.ones(r, dtype=torch.int64) for r in RESPONSES],
        [-4.6 + 0.1 * torch.randn(r, generator=generator) for r in RESPONSES],
    )


def make_batch(engine: Any, temperature: float, micro_batch_size: int = 1) -> Any:
    """This data-parallel rank's share, as verl's V1 trainer and worker hand it to the engine."""
    rank, dp = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    mine = range(rank * 4 // dp, (rank + 1) * 4 // dp)
    settings = {
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": micro_batch_size,
        "use_remove_padding": engine.model_config.use_remove_padding,
        "use_fused_kernels": engine.engine_config.use_fused_kernels,
    }
    return to_verl(recorded(), mine, temperature, settings)


def to_verl(
    batch: RecordedBatch, mine: Sequence[int], temperature: float, settings: dict[str, Any]
) -> Any:
    """verl's fields of the sequences ``mine`` of a batch, without padding."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([rows[i] for i in mine], layout=torch.jagged)

    fields = {
        "input_ids": nested(batch.ids),
        "prompts": nested(
            [ids[:prompt] for ids, prompt in zip(batch.ids, batch.prompts, strict=True)]
        ),
        "responses": nested(
            [ids[prompt:] for ids, prompt in zip(batch.ids, batch.prompts, strict=True)]
        ),
        "position_ids": nested([torch.arange(len(ids)) for ids in batch.ids]),
        "response_mask": nested(batch.response_mask),
        "loss_mask": nested(batch.response_mask),
        "old_log_probs": nested(batch.old_log_probs),
        "advantages": nested(batch.advantages),
    }
    data = tu.get_tensordict(
        fields, {"calculate_entropy": True, "global_batch_size": len(batch.ids), **settings}
    )
    set_temperature(data, temperature, settings.get("use_fused_kernels", False))
    tu.assign_non_tensor(data, pad_mode=DatasetPadMode.NO_PADDING)
    return data


def make_loss(
    loss_mode: str, knobs: dict[str, Any] | None, loss_agg_mode: str = "seq-mean-token-mean"
) -> Any:
    """verl's loss function as its worker binds it; ``knobs=None`` is a run without the switch."""
    from verl.workers.config import McoreActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    from capo_verl.plugin.policy_loss import CapoPolicyLossConfig

    policy_loss = (
        PolicyLossConfig(loss_mode=loss_mode)
        if knobs is None
        else CapoPolicyLossConfig(loss_mode=loss_mode, capo=dict(knobs))
    )
    config = McoreActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy_loss,
        loss_agg_mode=loss_agg_mode,
    )
    return partial(ppo_loss, config=config)


def train(
    layout: Layout,
    model_path: str,
    loss_mode: str,
    knobs: dict[str, Any] | None,
    temperature: float = 1.0,
    micro_batch_size: int = 1,
    steps: int = STEPS,
    own_engine: bool = True,
) -> dict[str, Any]:
    if not own_engine:
        use_verls_engine()
    engine = make_engine(layout, model_path, optimizer="adam", lr=LR)
    return train_engine(engine, loss_mode, knobs, temperature, micro_batch_size, steps)


def train_engine(
    engine: Any,
    loss_mode: str,
    knobs: dict[str, Any] | None,
    temperature: float = 1.0,
    micro_batch_size: int = 1,
    steps: int = STEPS,
) -> dict[str, Any]:
    """A few optimizer steps; what this rank reports, and the weights and moments after them."""
    loss = make_loss(loss_mode, knobs)
    reports = []
    with engine.train_mode():
        for _ in range(steps):
            output = engine.train_batch(make_batch(engine, temperature, micro_batch_size), loss)
            if engine.is_mp_src_rank_with_outputs():
                reports.append({"loss": sum(output["loss"]), **output["metrics"]})
    return {"reports": reports, "weights": export(engine), "state": moments(engine)}


def moments(engine: Any) -> dict[str, Any] | None:
    """A copy of the filter's state on this rank."""
    if getattr(engine, "_step", None) is None:
        return None
    return {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in engine._step.capo.state_dict().items()
    }


def use_verls_engine() -> None:
    """Register verl's own engine class with what a CPU needs, in place of ours."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    from capo_verl.cpu.megatron.engine import CpuMegatronMixin

    registry = EngineRegistry._engines["language_model"]["megatron"]
    registry["cpu"] = type("VerlOnCpu", (CpuMegatronMixin, MegatronEngineWithLMHead), {})
