# SPDX-License-Identifier: Apache-2.0
"""The KL probe of engines in bfloat16, on one rank: what it measured, and the same in float64 from
what the LM head was given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from capo_verl.core import collectives
from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.engines.megatron.kl_cases import batch_of, knobs_of, make, step

SMALL_STEP = 0.01
"""Of the tests' learning rate: a KL that the rounding of logits changes."""


def half_precision_engine(case: Any, model_path: str, **settings: Any) -> Any:
    """The CPU engines train in float32.

    Megatron's can in bfloat16; FSDP's runs its forward pass under autocast, as on a GPU.
    """
    if isinstance(case, FsdpLayout):
        engine = make(case, model_path, **settings)
        engine._autocast_dtype = torch.bfloat16
        return engine
    from capo_verl.cpu.megatron import engine as cpu_engine

    cpu_engine.ENGINE_CONFIG["dtype"] = "bfloat16"
    return make(case, model_path)


def measured(case: Any, model_path: str, change: str = "", **settings: Any) -> dict[str, Any]:
    """Two optimizer steps under the budget, of which the second is looked at.

    Args:
        change: ``cap`` for a Megatron model that caps its logits after the LM head, ``adapter`` for
            one with an adapter around it.

    Returns:
        ``kl``: what was reported, where anything is. On every rank that holds the LM head, in
            float64: ``exact`` from the hidden
        states and weights that it was given, ``rounded`` from the logits that the model made.
        ``passes``: looks at the policy, in training and after it.
    """
    from capo_verl.engines.kl_probe import KLProbe

    engine, looks, warnings = half_precision_engine(case, model_path, **settings), [], []
    see, see_head, running = KLProbe.see, KLProbe.see_head, KLProbe.running
    alter(engine, change)
    for group in engine.optimizer.param_groups:
        group["lr"] *= SMALL_STEP

    @contextmanager
    def spied_running(probe: Any, which: str) -> Iterator[None]:
        looks.append([])
        with running(probe, which):
            yield

    def spied_head(probe: Any, call: Any, response: Any) -> None:
        looks[-1].append({"call": call and call.head and product(call)})
        see_head(probe, call, response)

    def spied_see(
        probe: Any, logits: Any, hidden: Any, temperature: Any, response: Any, place: int
    ) -> None:
        if not looks[-1] or "rounded" in looks[-1][-1]:
            looks[-1].append({"call": None})
        at = response.response_mask.flatten().nonzero()[:, 0]
        seen = looks[-1][-1]
        seen["rounded"] = logits.detach().flatten(0, -2)[at].double().clone()
        seen["exact"] = None if seen["call"] is None else seen["call"].flatten(0, -2)[at]
        see(probe, logits, hidden, temperature, response, place)

    def product(call: Any) -> torch.Tensor:
        hidden = call.hidden_states.to(call.head.weight.dtype).double()
        return hidden @ call.head.weight.double().T

    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("capo_verl.engines.kl_probe").addHandler(handler)
    KLProbe.running, KLProbe.see_head, KLProbe.see = spied_running, spied_head, spied_see
    for _ in range(2):
        report = step(engine, batch_of(engine, case), knobs_of(rate_min=1.0))
    probe, passes = engine._kl.probe, [look for look in looks if look]
    result = {"recomputes": probe._recomputes, "passes": len(looks), "warnings": warnings}
    if report:
        (result["kl"],) = report["capo/kl_mean"]
    if passes:
        for name in ("exact", "rounded"):
            if passes[-1][0][name] is not None:
                result[name] = mean_kl(passes[-2], passes[-1], name, probe._head)
    return result


def mean_kl(before: list, after: list, name: str, head: Any) -> float:
    """Nats per token over all ranks, float64, straight from the definition."""
    old, new = (
        torch.cat([x[name] for x in look])[:, : head.shard.rows] for look in (before, after)
    )
    old, new = (collectives.gather(x, head.tp_group).log_softmax(-1) for x in (old, new))
    kl = (old.exp() * (old - new)).sum(-1)
    total = collectives.sum_(
        torch.stack((kl.sum(), torch.tensor(len(kl)).double())), (head.dp_group, head.cp_group)
    )
    return float(total[0] / total[1])


class Adapter(torch.nn.Module):
    """As adapters wrap the LM head: the layer itself, and what is added to it."""

    def __init__(self, to_wrap: torch.nn.Module):
        super().__init__()
        self.to_wrap = to_wrap

    def __getattr__(self, name: str) -> Any:
        return (
            super().__getattr__(name)
            if name == "to_wrap"
            else getattr(super().__getattr__("to_wrap"), name)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.to_wrap(*args, **kwargs)


def alter(engine: Any, change: str) -> None:
    """Make the Megatron model cap its logits, or wrap its LM head."""
    from verl.utils.megatron_utils import unwrap_model

    model = unwrap_model(engine.module[-1]) if change else None
    if model is None or not model.post_process:
        return
    if change == "adapter":
        model.output_layer = Adapter(model.output_layer)
    if change == "cap":
        model.register_forward_hook(lambda module, args, output: 30 * torch.tanh(output / 30))
