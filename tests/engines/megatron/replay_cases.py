# SPDX-License-Identifier: Apache-2.0
"""The recorded batch on one rank of a layout: what ``test_layouts.py`` runs, several layouts in the
same processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.cpu.megatron.engine_cases import Layout, export, make_engine
from tests.engines.megatron.capo_cases import make_loss, to_verl
from tests.helpers.recording import BETAS, EPS, KNOBS, LEARNING_RATES, RecordedBatch

Recorded = TypeVar("Recorded")
REPLAY = {"replay": True}


@dataclass(frozen=True)
class Case:
    """A layout, and how the batch is cut, ordered and padded in it.

    Args:
        model: ``untied``, ``tied`` or ``odd-vocabulary``.
        micro_batch: sequences in a micro-batch; ``dynamic`` fills micro-batches with up to 40
            tokens.
        reverse: the batch in the opposite order.
        pad: ``minibatch`` pads every micro-batch to the longest sequence of the mini-batch, a
            number to that length (padded batches) or to a multiple of it (packed batches). Default:
            to its own longest sequence.
        fused: verl's fused cross-entropy, without logits.
        replay: verl's router replay: tokens go to the experts that the first policy chose.
    """

    layout: Layout
    model: str = "untied"
    temperature: float = 1.0
    micro_batch: int | str = 2
    reverse: bool = False
    pad: int | str | None = None
    fused: bool = False
    replay: bool = False

    def __str__(self) -> str:
        options = [
            self.model if self.model != "untied" else "",
            f"temperature {self.temperature}" if self.temperature != 1.0 else "",
            f"micro-batch {self.micro_batch}" if self.micro_batch != 2 else "",
            "reversed" if self.reverse else "",
            f"pad {self.pad}" if self.pad else "",
            "fused" if self.fused else "",
            "router replay" if self.replay else "",
        ]
        return ", ".join([str(self.layout), *filter(None, options)])


def once_per_model(
    record: Callable[..., Recorded], models: dict[str, str]
) -> Callable[[Case], Recorded]:
    """The recording a case is compared with: ``record(path, temperature, padded_rows)``, each made
    once.
    """
    recordings: dict[tuple[Any, ...], Recorded] = {}

    def get(case: Case) -> Recorded:
        padded_rows = -125 % case.layout.tp if case.model == "odd-vocabulary" else 0
        key = (case.model, case.temperature, padded_rows, case.replay)
        if key not in recordings:
            recordings[key] = record(
                models[case.model], case.temperature, padded_rows, **REPLAY if case.replay else {}
            )
        return recordings[key]

    return get


@dataclass
class ReplayedStep:
    """What one rank saw in one optimizer step.

    Per-token arrays hold the response tokens of this rank's share.
    """

    advantages: torch.Tensor
    actions: torch.Tensor
    hidden_states: torch.Tensor
    objective_shift: torch.Tensor
    policy_shift: torch.Tensor
    accepted: torch.Tensor
    metrics: dict[str, Any] | None
    """verl's output for the step, with the loss; on the ranks where verl reads it."""
    gradients: dict[str, torch.Tensor] | None
    """Under Hugging Face names, whole; on the first and the last rank."""


@dataclass
class Replay:
    steps: list[ReplayedStep]
    weights: dict[str, torch.Tensor] | None
    """Likewise."""
    place: tuple[int, int, bool]
    """Data- and context-parallel rank, and whether the rank holds the LM head."""


def replay(
    case: Case,
    batch: RecordedBatch,
    model_path: str,
    learning_rates: Sequence[float] = LEARNING_RATES,
    bridge: str = "",
) -> Replay:
    """One optimizer step per learning rate."""
    from megatron.core import parallel_state as mpu

    engine = make_engine(
        case.layout, model_path, optimizer="adam", lr=learning_rates[0],
        optimizer_overrides={"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPS},
        use_fused_kernels=case.fused, bridge=bridge, **_padding(case), **_replay(case),
    )  # fmt: skip
    loss = make_loss("capo", KNOBS)
    data = make_batch(case, batch, mpu.get_data_parallel_rank())
    if case.replay:
        data["routed_experts"] = routes(engine, data)
    steps = []
    with engine.train_mode():
        for learning_rate in learning_rates:
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate
            steps.append(_train_step(engine, data, loss))
    place = mpu.get_data_parallel_rank(), mpu.get_context_parallel_rank(), engine._step is not None
    return Replay(steps, _of_end_ranks(export(engine)), place)


def _of_end_ranks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """They are the same on all ranks, and large."""
    return tensors if dist.get_rank() in (0, dist.get_world_size() - 1) else None


def _padding(case: Case) -> dict[str, Any]:
    """``actor_rollout_ref.actor.megatron`` for the padding of the case."""
    bucket = (
        {"pad_to_length": True, "pad_to_length_bucket": case.pad}
        if case.pad and case.layout.packed
        else {}
    )
    return {"pad_bshd_to_minibatch_max": case.pad == "minibatch", **bucket}


def _replay(case: Case) -> dict[str, Any]:
    from verl.workers.config.engine import EngineRouterReplayConfig

    return {"router_replay": EngineRouterReplayConfig(mode="R2")} if case.replay else {}


def routes(engine: Any, data: Any) -> torch.Tensor:
    """The experts of each token and layer, nested ``[b, j, layers, k]``, recorded as verl's worker
    has it done together with the old log-probs, and handed to all ranks.
    """
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor(data, enable_routing_replay=True)
    with engine.eval_mode():
        found = engine.infer_batch(data)
    reports = engine.is_mp_src_rank_with_outputs()
    mine = list(found["model_output"]["routed_experts"].unbind()) if reports else None
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (engine.get_data_parallel_rank(), mine))
    wanted = engine.get_data_parallel_rank()
    rows = next(rows for rank, rows in gathered if rank == wanted and rows)
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_batch(case: Case, batch: RecordedBatch, dp_rank: int) -> Any:
    """This data-parallel rank's share, as verl's V1 trainer hands it to the engine."""
    count = len(batch.ids)
    order = list(range(count))[:: -1 if case.reverse else 1]
    mine = order[dp_rank * count // case.layout.dp : (dp_rank + 1) * count // case.layout.dp]
    settings: dict[str, Any] = {"use_dynamic_bsz": case.micro_batch == "dynamic"}
    if case.micro_batch == "dynamic":
        settings["max_token_len_per_gpu"] = 40
    else:
        settings["micro_batch_size_per_gpu"] = case.micro_batch
    if isinstance(case.pad, int) and not case.layout.packed:
        settings["forced_max_seqlen"] = case.pad
    return to_verl(batch, mine, case.temperature, settings)


def _train_step(engine: Any, data: Any, loss: Any) -> ReplayedStep:
    gradients: dict[str, torch.Tensor] = {}
    own = type(engine).optimizer_step

    def optimizer_step() -> Any:
        gradients.update(export_gradients(engine))
        return own(engine)

    engine.optimizer_step = optimizer_step
    with evaluations(engine.engine_config.use_fused_kernels) as seen:
        output = engine.train_batch(data, loss)
    del engine.optimizer_step
    metrics = None
    if engine.is_mp_src_rank_with_outputs():
        metrics = {**output["metrics"], "loss": sum(output["loss"])}
    columns = {
        name: torch.cat([row[name] for row in seen]) if seen else torch.empty(0) for name in COLUMNS
    }
    return ReplayedStep(**columns, metrics=metrics, gradients=_of_end_ranks(gradients))


COLUMNS = ("advantages", "actions", "hidden_states", "objective_shift", "policy_shift", "accepted")


@contextmanager
def evaluations(fused: bool) -> Iterator[list[dict[str, torch.Tensor]]]:
    """What goes into ``CapoFilter.evaluate`` and comes out of it, response tokens only, one entry
    per call.

    With ``fused`` it must be given the LM head, otherwise logits.
    """
    from capo_verl import CapoFilter
    from capo_verl.core import ProjectedLogits

    evaluate, seen = CapoFilter.evaluate, []

    def recorded(self: Any, hidden_states: Any, logits: Any, actions: Any, advantages: Any,
        mask: Any, *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
        out = evaluate(self, hidden_states, logits, actions, advantages, mask, *args, **kwargs)
        assert isinstance(logits, ProjectedLogits) == fused
        mask = mask.bool()
        assert not out.accepted[~mask].any()
        seen.append(
            {
                "advantages": advantages[mask], "actions": actions[mask],
                "hidden_states": hidden_states[mask], "objective_shift": out.objective_shift[mask],
                "policy_shift": out.policy_shift[mask], "accepted": out.accepted[mask],
            }
        )  # fmt: skip
        return out

    CapoFilter.evaluate = recorded
    try:
        yield seen
    finally:
        CapoFilter.evaluate = evaluate


def export_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """The gradients after their reduction, under Hugging Face names: exported in the place of the
    weights.
    """
    if engine.engine_config.use_distributed_optimizer:
        _gather_gradient_shards(engine)
    parameters = [p for chunk in engine.module for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    # What verl plans once for Megatron-Bridge holds the dtypes of the weights.
    planned, engine._hf_export_tasks = engine._hf_export_tasks, None
    try:
        for p in parameters:
            p.data = p.main_grad.view_as(p)
        return export(engine)
    finally:
        engine._hf_export_tasks = planned
        for p, weight in zip(parameters, weights, strict=True):
            p.data = weight


def _gather_gradient_shards(engine: Any) -> None:
    """The distributed optimizer leaves each data-parallel rank its shard of the reduced gradient;
    here all get all.
    """
    for chunk in engine.module:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.view(group.size(), -1))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
