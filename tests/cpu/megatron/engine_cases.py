# SPDX-License-Identifier: Apache-2.0
"""One engine on one rank, and the batch that every layout of every engine gets: what the tests run
on gloo ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from capo_verl.cpu.expert_weights import one_by_one
from tests.helpers.bridge import settings_of

LENGTHS = (9, 12, 7, 12)
PROMPT = 4


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, sequence parallelism, whether batches are packed (``use_remove_padding``),
    who holds Adam's state; of experts ranks that share them and, per expert, its matrices.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    sp: bool = False
    packed: bool = True
    vpp: int = 1
    distributed_optimizer: bool = False
    ep: int = 1
    etp: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def __str__(self) -> str:
        sizes = [
            f"{name}{getattr(self, name)}"
            for name in ("tp", "pp", "vpp", "dp", "cp", "ep", "etp")
            if (getattr(self, name) or 0) > (name != "etp")
        ]
        options = ("+sp" if self.sp else "") + ("+dist-opt" if self.distributed_optimizer else "")
        return ("".join(sizes) or "one") + options + ("" if self.packed else "-padded")


def sequences() -> list[torch.Tensor]:
    """Token ids of four sequences of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 100, (length,), generator=generator) for length in LENGTHS]


def next_token_mask(length: int) -> torch.Tensor:
    """1 where a position predicts a token of the response: the engine's log-probs at ``t`` are of
    token ``t + 1``.
    """
    mask = torch.zeros(length)
    mask[PROMPT - 1 : length - 1] = 1
    return mask


def make_batch(
    engine: Any, micro_batch_size: int = 1, rows: list[torch.Tensor] | None = None
) -> Any:
    """This data-parallel rank's share of the sequences (or `rows`), as verl's worker hands it to
    the engine.
    """
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    rank, dp = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    rows = sequences() if rows is None else rows
    mine = rows[rank * len(rows) // dp : (rank + 1) * len(rows) // dp]
    batch = tu.get_tensordict(
        {
            "input_ids": nested(mine),
            "position_ids": nested([torch.arange(len(row)) for row in mine]),
            "loss_mask": nested([next_token_mask(len(row)) for row in mine]),
        },
        {
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch_size,
            "calculate_entropy": True,
        },
    )
    set_temperature(batch, 1.0, bool(engine.engine_config.use_fused_kernels))
    tu.assign_non_tensor(
        batch,
        pad_mode=DatasetPadMode.NO_PADDING,
        use_remove_padding=engine.model_config.use_remove_padding,
    )
    return batch


def set_temperature(batch: Any, temperature: float, fused: bool) -> None:
    """One per sequence, or one for all as verl's trainer has it, which is what its fused
    cross-entropy of FSDP allows.
    """
    from verl.utils import tensordict_utils as tu

    if fused:
        tu.assign_non_tensor(batch, temperature=temperature, use_fused_kernels=True)
    else:
        batch["temperature"] = torch.full((len(batch),), temperature)


def nll(model_output: dict, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
    """Mean negative log-likelihood of the response tokens of the whole batch, in verl's scaling
    over ranks.
    """
    log_probs, mask = model_output["log_probs"].values(), data["loss_mask"].values()
    return -(log_probs * mask).sum() / data["batch_num_tokens"] * data["dp_size"], {}


def with_bridge(bridge: str, megatron: dict[str, Any]) -> dict[str, Any]:
    """Settings of a bridge, and on top of them a test's own."""
    settings, key = settings_of(bridge), "override_transformer_config"
    override = {**settings.get(key, {}), **megatron.get(key, {})}
    return {**settings, **megatron, key: override}


def make_engine(
    layout: Layout,
    model_path: str,
    optimizer: str = "sgd",
    lr: float = 0.5,
    optimizer_overrides: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    bridge: str = "",
    **megatron: Any,
) -> Any:
    """An initialised engine.

    Args:
        bridge: one of ``BRIDGES``; by default the one of the environment.
        megatron: further settings of ``actor_rollout_ref.actor.megatron``.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    import capo_verl.cpu.megatron.engine  # noqa: F401  registers

    model_config = HFModelConfig(
        path=model_path, use_remove_padding=layout.packed, **({"lora": lora} if lora else {})
    )
    model_config.model_type = "language_model"
    engine_config = McoreEngineConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sp,
        use_remove_padding=layout.packed,
        use_distributed_optimizer=layout.distributed_optimizer,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        **with_bridge(bridge, megatron),
    )
    optimizer_config = McoreOptimizerConfig(
        optimizer=optimizer, lr=lr, lr_decay_steps=100, lr_decay_style="constant", weight_decay=0.0,
        clip_grad=1.0, override_optimizer_config=optimizer_overrides or {},
    )  # fmt: skip
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="megatron",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def export(engine: Any) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names. Collective: every rank must call it."""
    return one_by_one(
        {name: tensor.detach().clone() for name, tensor in engine.get_per_tensor_param()[0]}
    )


def train_step(engine: Any, micro_batch_size: int = 1) -> float:
    with engine.train_mode():
        engine.forward_backward_batch(make_batch(engine, micro_batch_size), nll)
        return float(engine.optimizer_step())


@dataclass
class Measured:
    """What one rank saw.

    Log-probs and entropy (one tensor per sequence) only where verl reads them.
    """

    exported: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor]
    grad_norm: float
    log_probs: list[torch.Tensor] = dataclasses.field(default_factory=list)
    entropy: list[torch.Tensor] = dataclasses.field(default_factory=list)


def forward(engine: Any, micro_batch_size: int = 1) -> dict[str, list[torch.Tensor]]:
    """Log-probs and entropy of this rank's sequences; nothing where verl reads nothing."""
    with engine.eval_mode(), torch.no_grad():
        output = engine.forward_backward_batch(
            make_batch(engine, micro_batch_size), None, forward_only=True
        )
    if not engine.is_mp_src_rank_with_outputs():
        return {}
    return {
        name: [row.clone() for row in output["model_output"][name].unbind()]
        for name in ("log_probs", "entropy")
    }


def measure_engine(engine: Any, micro_batch_size: int = 1) -> Measured:
    exported = export(engine)
    outputs = forward(engine, micro_batch_size)
    grad_norm = train_step(engine, micro_batch_size)
    return Measured(exported, export(engine), grad_norm, **outputs)


def measure(
    layout: Layout,
    model_path: str,
    transformer_config: dict[str, Any] | None = None,
    fused: bool = False,
) -> Measured:
    settings = {"override_transformer_config": transformer_config or {}, "use_fused_kernels": fused}
    return measure_engine(make_engine(layout, model_path, **settings))


def counted_tokens(layout: Layout, model_path: str) -> tuple[int, list[int]]:
    """Tokens of the whole batch as verl counts them for a loss per token, and the lengths of this
    rank's sequences after the step.
    """
    override = {"calculate_per_token_loss": True}
    engine = make_engine(layout, model_path, override_transformer_config=override)
    batch = make_batch(engine)
    with engine.train_mode():
        engine.forward_backward_batch(batch, nll)
    return batch["routed_num_tokens"], batch["input_ids"].offsets().diff().tolist()


def save_and_resume_engine(
    make: Callable[[], Any], directory: str
) -> list[dict[str, torch.Tensor]]:
    """Weights when saved, one step later, and twice after loading and one step later: into a new
    engine, into the same.
    """
    engine = make()
    train_step(engine)
    weights = [export(engine)]
    engine.save_checkpoint(directory, global_step=1)
    train_step(engine)
    weights.append(export(engine))
    for resumed in (make(), engine):
        resumed.load_checkpoint(directory, del_local_after_load=False)
        weights.append(export(resumed))
        train_step(resumed)
        weights.append(export(resumed))
    return weights


def save_and_resume(
    layout: Layout, model_path: str, directory: str
) -> list[dict[str, torch.Tensor]]:
    return save_and_resume_engine(
        lambda: make_engine(layout, model_path, optimizer="adam", lr=1e-2), directory
    )
