# SPDX-License-Identifier: Apache-2.0
"""Training under a KL budget on one rank of any engine: what the tests of the control run on gloo
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.cpu.fsdp.engine_cases import FsdpLayout, make_fsdp_engine
from tests.cpu.megatron.engine_cases import export, make_engine
from tests.engines.megatron import replay_cases
from tests.engines.megatron.capo_cases import make_loss, to_verl
from tests.helpers.kl_recording import ADAM_LR, DELTA, ETA, LEAST, SGD_LR, STEPS
from tests.helpers.recording import BETAS, EPS, RecordedBatch

PROBED = tuple(range(8))


@dataclass
class Trained:
    reports: list[dict[str, Any]]
    """verl's metrics of each step; empty on ranks where it reads none."""
    state: dict[str, Any]
    learning_rates: list[float]
    """Of the optimizer, between the steps."""
    weights: dict[str, torch.Tensor] | None


def knobs_of(**budget: Any) -> dict[str, Any]:
    return {
        "mode": "off",
        "kl_budget": {
            "delta": DELTA * 32 / len(PROBED),
            "eta": ETA,
            "probe_share": 1.0,
            "rate_min": LEAST,
            **budget,
        },
    }


def make(case: replay_cases.Case | FsdpLayout, model_path: str, **settings: Any) -> Any:
    if isinstance(case, FsdpLayout):
        return make_fsdp_engine(case, model_path, optimizer="SGD", lr=SGD_LR, **settings)
    return make_engine(
        case.layout, model_path, optimizer="adam", lr=ADAM_LR,
        optimizer_overrides={"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPS},
        use_fused_kernels=case.fused, **replay_cases._padding(case), **replay_cases._replay(case),
        **settings,
    )  # fmt: skip


def batch_of(engine: Any, case: replay_cases.Case | FsdpLayout, temperature: float = 1.0) -> Any:
    batch, rank = RecordedBatch.make(), engine.get_data_parallel_rank()
    if not isinstance(case, FsdpLayout):
        return replay_cases.make_batch(case, batch, rank)
    count = len(batch.ids)
    mine = range(rank * count // case.dp, (rank + 1) * count // case.dp)
    settings = {
        "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "use_remove_padding": case.packed,
        "use_fused_kernels": bool(case.fused),
    }  # fmt: skip
    return to_verl(batch, mine, temperature, settings)


def step(
    engine: Any, data: Any, knobs: dict[str, Any] | None, loss_mode: str = "capo"
) -> dict[str, Any]:
    """One optimizer step; verl's metrics where this rank reports any."""
    with engine.train_mode():
        output = engine.train_batch(data, make_loss(loss_mode, knobs))
    return dict(output["metrics"]) if engine.is_mp_src_rank_with_outputs() else {}


def train(
    case: replay_cases.Case | FsdpLayout,
    model_path: str,
    knobs: dict[str, Any] | None,
    at: list[float] | None = None,
    dropout: bool = False,
    settings: dict[str, Any] | None = None,
) -> Trained:
    """``STEPS`` optimizer steps.

    Args:
        at: learning rates, in place of the engine's.
        dropout: pretend that training draws random numbers, so that the policy before each step is
            looked at in a pass of its own.
        settings: of the engine.
    """
    engine = make(case, model_path, **(settings or {}))
    if dropout:
        engine._has_dropout = lambda: True
    reports, rates = [], []
    data = batch_of(engine, case)
    if getattr(case, "replay", False):
        data["routed_experts"] = replay_cases.routes(engine, data)
    for i in range(STEPS):
        if at is not None:
            for group in engine.optimizer.param_groups:
                group["lr"] = at[i]
        reports.append(step(engine, data.clone(), knobs))
        rates.append(float(engine.optimizer.param_groups[0]["lr"]))
    state = {} if engine._kl is None else engine._kl.budget.state_dict()
    return Trained(reports, state, rates, replay_cases._of_end_ranks(export(engine)))


def adaptive(
    case: Any, model_path: str, knobs: dict[str, Any], steps: int = 4
) -> list[dict[str, Any]]:
    """What every rank knows after each step: verl's metrics, if any, and the controller's state."""
    engine, found = make(case, model_path), []
    for _ in range(steps):
        found.append(
            {
                "report": step(engine, batch_of(engine, case), knobs),
                "state": engine._kl.budget.state_dict(),
            }
        )
    return found


def mini_batches(case: Any, model_path: str, old_log_probs: list[torch.Tensor]) -> dict[str, Any]:
    """A rollout of two mini-batches and one of a single mini-batch, with k3; the weights between
    the steps.
    """
    engine = make(case, model_path)
    batch = RecordedBatch.make()
    batch.old_log_probs = old_log_probs
    knobs, rank, dp = (
        knobs_of(estimator="k3", rate_min=0.1),
        engine.get_data_parallel_rank(),
        engine.get_data_parallel_size(),
    )
    reports, weights = [], [export(engine)]
    for first, last in ((0, False), (4, True), (0, True)):
        mine = range(first + rank * 4 // dp, first + (rank + 1) * 4 // dp)
        settings = {
            "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1, "update_lr_scheduler": last,
            "use_remove_padding": engine.model_config.use_remove_padding,
        }  # fmt: skip
        reports.append(step(engine, to_verl(batch, mine, 1.0, settings), knobs))
        weights.append(export(engine))
    return {
        "reports": reports,
        "weights": replay_cases._of_end_ranks({"all": weights}),
        "state": engine._kl.budget.state_dict(),
    }


def resumed(case: Any, model_path: str, checkpoint: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step; and the third step of a fresh engine that loads the
    checkpoint.
    """
    result = {}
    for name in ("uninterrupted", "resumed"):
        settings = (
            {} if isinstance(case, FsdpLayout) else {"dist_ckpt_optim_fully_reshardable": True}
        )
        engine = make(case, model_path, **settings)
        if name == "resumed":
            engine.load_checkpoint(checkpoint, del_local_after_load=False)
        else:
            for _ in range(2):
                step(engine, batch_of(engine, case), knobs)
            engine.save_checkpoint(checkpoint, global_step=2)
        report = step(engine, batch_of(engine, case), knobs)
        report = {k: v for k, v in report.items() if k.startswith("capo/") and "seconds" not in k}
        result[name] = {
            "report": report,
            "state": engine._kl.budget.state_dict(),
            "weights": export(engine),
        }
    return result


def load_control(case: Any, model_path: str, checkpoints: list[str]) -> list[str]:
    """What loading the control file of each folder says."""
    from capo_verl.engines import checkpoint_files

    said = []
    for path in checkpoints:
        try:
            said.append(str(checkpoint_files.load(path)))
        except RuntimeError as e:
            said.append(str(e))
    return said


def gather_under_way(case: replay_cases.Case, model_path: str) -> tuple[float, float]:
    """Least and largest parameter of the model after all were set to 1/4 by hand, begun while a
    gather of the old ones was under way.
    """
    from capo_verl.engines.megatron.parameters import optimised, spread

    engine = make(case, model_path, override_ddp_config={"overlap_param_gather": True})
    (chunk,) = engine.module
    chunk.start_param_sync()
    for tensor in optimised(engine.optimizer, engine.module):
        tensor.fill_(0.25)
    spread(engine.optimizer, engine.module)
    values = torch.cat([p.detach().flatten() for p in chunk.parameters()])
    return float(values.min()), float(values.max())
