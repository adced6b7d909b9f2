# SPDX-License-Identifier: Apache-2.0
"""Training steps on responses with a tool's output between two turns, on one rank of any engine:
what ``test_turns.py`` runs on gloo ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from capo_verl.core import ProjectedLogits
from tests.cpu.fsdp.engine_cases import FsdpLayout, make_fsdp_engine
from tests.cpu.megatron.engine_cases import Layout, export, make_engine
from tests.engines.megatron.capo_cases import LR, make_loss, moments, to_verl
from tests.helpers.recording import RecordedBatch

KNOBS = {
    "top_k": 20, "policy_shift_max": 1e-12, "objective_shift_max": None,
    "kl_budget": {"delta": 1e-4, "probe_share": 1.0},
}  # fmt: skip
STEPS = 2


def make(layout: Layout | FsdpLayout, model_path: str) -> Any:
    if isinstance(layout, FsdpLayout):
        return make_fsdp_engine(layout, model_path, optimizer="AdamW", lr=LR)
    return make_engine(layout, model_path, optimizer="adam", lr=LR)


def poison_like(values: torch.Tensor) -> torch.Tensor:
    """NaN, infinity and what is too large, in turn."""
    worst = torch.tensor([math.nan, math.inf, -1e30, -math.inf], dtype=values.dtype)
    return worst.repeat(len(values))[: len(values)]


def batch_of(engine: Any, poison: bool) -> Any:
    """Eight sequences; what is said of a tool's tokens is 0, or poison."""
    batch = RecordedBatch.make()
    batch.response_mask[2][3:6] = 0  # a span, beside the single tokens that are recorded
    settings = {
        "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2,
        "use_remove_padding": engine.model_config.use_remove_padding, "use_fused_kernels": False,
    }  # fmt: skip
    data = to_verl(batch, range(len(batch.ids)), 1.0, settings)
    outside = data["response_mask"].values() == 0
    data["ref_log_prob"] = data["old_log_probs"] - 0.1
    data["rollout_is_weights"] = torch.ones_like(data["old_log_probs"])
    for name in ("advantages", "old_log_probs", "ref_log_prob", "rollout_is_weights"):
        values = data[name].values()[outside]
        data[name].values()[outside] = poison_like(values) if poison else 0.0
    return data


def train(
    layout: Layout | FsdpLayout, model_path: str, poison: bool, loss_mode: str
) -> dict[str, Any]:
    """Reports of the steps, weights and moments after them.

    With poison the filter and the probe also find it in the hidden states and logits of every
    place that is not about a token of the policy.
    """
    from capo_verl.engines.filter_step import FilterStep
    from capo_verl.engines.kl_probe import KLProbe

    def poisoned(values: Any, mask: torch.Tensor) -> Any:
        if not poison or values is None or isinstance(values, ProjectedLogits):
            return values
        spoilt = values.detach().clone()
        spoilt[~mask] = poison_like(spoilt[~mask][:, 0])[:, None]
        return spoilt

    evaluate, see = FilterStep.evaluate, KLProbe.see

    def evaluate_poisoned(self: Any, hidden: Any, logits: Any, *args: Any) -> Any:
        mask = args[2].response_mask
        return evaluate(self, poisoned(hidden, mask), poisoned(logits, mask), *args)

    def see_poisoned(self: Any, logits: Any, hidden: Any, temperature: Any, response: Any,
                     place: int) -> None:  # fmt: skip
        mask = response.response_mask
        see(self, poisoned(logits, mask), poisoned(hidden, mask), temperature, response, place)

    FilterStep.evaluate, KLProbe.see = evaluate_poisoned, see_poisoned  # type: ignore[assignment, method-assign]
    engine = make(layout, model_path)
    loss, reports = make_loss(loss_mode, KNOBS), []
    object.__setattr__(loss.keywords["config"], "use_kl_loss", True)  # so that ref_log_prob is read
    with engine.train_mode():
        for _ in range(STEPS):
            output = engine.train_batch(batch_of(engine, poison), loss)
            metrics = {
                name: value.aggregate() if hasattr(value, "aggregate") else value
                for name, value in output["metrics"].items()
                if "seconds" not in name
            }
            reports.append({"loss": sum(output["loss"]), **metrics})
    return {"reports": reports, "weights": export(engine), "state": moments(engine)}
