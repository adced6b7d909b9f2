# SPDX-License-Identifier: Apache-2.0
"""NaN, a number too large, or a decision of its own on one rank: every rank learns where it is
before the optimizer steps; the run stops, or leaves the batch out.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from capo_verl import CapoFilter
from capo_verl.engines.nonfinite import NonFinite
from tests.cpu.megatron.engine_cases import Layout, export
from tests.engines.megatron.capo_cases import KNOBS, make_batch, make_loss
from tests.engines.megatron.state_cases import moments, new_engine, step
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

NAN = float("nan")


def poisoned_step(engine: Any, knobs: dict[str, Any], where: str) -> dict[str, Any]:
    """A step in which one value on the last rank is NaN, or one decision the opposite."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    batch = make_batch(engine, 1.0)
    handle = None
    if last and where in ("advantages", "old_log_probs"):
        batch[where].values()[-2] = NAN  # of the rank's last sample
    if last and where == "size":
        batch["advantages"].values()[-2] = 1e20  # finite, but its square is not
    if (where == "gradient" and torch.distributed.get_rank() == 0) or (where == "weight" and last):
        model = engine.module[-1] if isinstance(engine.module, list) else engine.module
        norm = next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm"))
        handle = norm.register_forward_hook(_nan_gradient if where == "gradient" else _nan_output)
    evaluate = _contrary if last and where == "decision" else CapoFilter.evaluate
    try:
        with engine.train_mode(), mock.patch.object(CapoFilter, "evaluate", evaluate):
            return engine.train_batch(batch, make_loss("capo", knobs))["metrics"]
    finally:
        if handle is not None:
            handle.remove()


def _contrary(
    self: CapoFilter, *args: Any, evaluate: Any = CapoFilter.evaluate, **kwargs: Any
) -> Any:
    out = evaluate(self, *args, **kwargs)
    token = int(args[4].flatten().nonzero()[0])
    out.weights.view(-1)[token] = 1 - out.weights.view(-1)[token]
    return out


def _nan_output(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * NAN


def _nan_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * NAN)


def stop(layout: Layout, model: str, where: str) -> dict[str, Any]:
    engine = new_engine(layout, model)
    step(engine)
    before, kept = export(engine), moments(engine)
    message = "no error"
    try:
        poisoned_step(engine, KNOBS, where)
    except RuntimeError as e:
        message = str(e)
    after = export(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    if kept:
        assert all(
            torch.equal(kept[name], moments(engine)[name]) for name in ("exp_avg", "exp_avg_sq")
        )
    return {"message": message}


def stops(layout: Layout, model: str, places: list[str]) -> list[str]:
    return [stop(layout, model, where)["message"] for where in places]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            Layout(dp=2),
            {
                "advantages": "rank 1: advantages are not finite, first in sample 1 of its "
                "mini-batch",
                "old_log_probs": "rank 1: old_log_probs are not finite, first in sample 1 of its "
                "mini-batch",
                "size": "rank 1: advantages, hidden_states or learning_rate are too large: their "
                "products overflow, first in sample 1 of its mini-batch",
            },
        ),
        (Layout(pp=2), {"gradient": "rank 0: gradients are not finite"}),
        (
            Layout(tp=2),
            {
                "weight": "hidden_states are not finite",
                "decision": "rank 1: decisions about tokens are not those of rank 0, which has the "
                "same tokens. Nothing",
            },
        ),
    ],
    ids=str,
)
def test_all_ranks_stop_with_the_place_in_the_message(layout, expected, tiny_qwen2):
    ranks = run_on_ranks(stops, 2, layout, tiny_qwen2, list(expected), preload=ENGINE_MODULES)
    assert ranks[0] == ranks[1]  # the same on every rank
    for message, place in zip(ranks[0], expected.values(), strict=True):
        assert message.startswith("optimizer step ") and place in message
        assert "Nothing was updated." in message and "on_nonfinite=skip_batch" in message


CONTRADICTIONS = [
    ({}, {}),
    ({1: [0, 0, 1], 3: [0, 0, 1]}, {}),  # other data-parallel ranks have other tokens
    ({3: [1, 0, 0.999]}, {3: 1}),
    ({0: [0, 1, 1]}, {2: 0}),  # as many tokens as the others
]


def noted() -> list[list[str]]:
    """What a rank of two tensor-parallel groups, 0 and 2, 1 and 3, learns if each rank decided
    twice as given, and the others as by default.
    """
    groups = [torch.distributed.new_group([first, first + 2]) for first in (0, 1)]
    rank, said = torch.distributed.get_rank(), []
    nonfinite = NonFinite(torch.device("cpu"), groups[rank % 2])
    for decisions, _ in CONTRADICTIONS:
        for weight in decisions.get(rank, [1, 0, 1]) * 2:
            nonfinite.note_decisions(torch.tensor([[float(weight)]]))
        said.append([str(finding) for finding in nonfinite.agree(torch.distributed.group.WORLD)])
        nonfinite.clear()
    return said


def test_all_ranks_learn_who_decides_otherwise_than_its_tensor_parallel_group():
    expected = [
        [
            f"rank {rank}: decisions about tokens are not those of rank {first}, which has the "
            "same tokens"
            for rank, first in found.items()
        ]
        for _, found in CONTRADICTIONS
    ]
    assert run_on_ranks(noted, 4, preload=ENGINE_MODULES) == [expected] * 4


def skip(layout: Layout, model: str, poisoned: bool) -> dict[str, Any]:
    knobs = {**KNOBS, "on_nonfinite": "skip_batch"}
    engine = new_engine(layout, model)
    reports = [step(engine, knobs)]
    if poisoned:
        metrics = poisoned_step(engine, knobs, "advantages")
        reports.append(
            {"skipped": metrics.get("capo/batch_skipped"), "grad_norm": metrics.get("grad_norm")}
        )
    reports.append(step(engine, knobs))
    return {"reports": reports, "weights": export(engine), "moments": moments(engine)}


def with_and_without(layout: Layout, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return skip(layout, model, poisoned=False), skip(layout, model, poisoned=True)


def test_a_skipped_batch_leaves_no_trace(tiny_qwen2):
    """The step after it is, bit for bit, the one that would have come without it."""
    for a, b in run_on_ranks(with_and_without, 2, Layout(dp=2), tiny_qwen2, preload=ENGINE_MODULES):
        assert b["reports"][1] == {"skipped": [1.0], "grad_norm": 0.0}
        assert a["reports"] == [b["reports"][0], b["reports"][2]]
        assert a["reports"][0]["capo/batch_skipped"] == [0.0]
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
        assert a["moments"]["step"] == b["moments"]["step"] == 2
        assert all(
            torch.equal(a["moments"][name], b["moments"][name])
            for name in ("exp_avg", "exp_avg_sq")
        )
