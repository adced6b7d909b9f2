# SPDX-License-Identifier: Apache-2.0
"""A run takes over all that a checkpoint holds for it, or nothing: on every rank, also on those
that hold no part of it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.kl_budget import KLBudget
from tests.helpers.spawn import run_on_ranks
from tests.helpers.unchanged import contents

pytestmark = pytest.mark.ranks

V, H = 10, 4
KNOBS: dict[str, Any] = {
    "top_k": 4, "policy_shift_max": {"target_rejection": 0.2}, "max_rejection": 0.5,
    "objective_shift_max": None, "kl_budget": {"delta": 1e-4},
}  # fmt: skip
GOOD = {
    "filter_stopped": 1, "rejection_streak": 3,
    "threshold_quantile": 2e3, "threshold_correction": 0.5, "threshold_steps": 4,
}  # fmt: skip
PATH = "/somewhere/global_step_3/actor"


def make_engine(knobs: dict[str, Any], state: Any, trains: bool) -> Any:
    """What the mixin needs of an engine; the second rank holds no LM head.

    Args:
        state: what the moments' file holds.
        trains: True if a training step has been made before the checkpoint is loaded.
    """
    from capo_verl.engines.checkpoint import CapoCheckpointMixin

    class Verl:
        weights = "before"

        def load_checkpoint(self, path: str) -> None:
            self.weights = "loaded"

        def save_checkpoint(self, path: str) -> None:
            pass

    class Engine(CapoCheckpointMixin, Verl):
        def _load_state(self, checkpoint: str) -> Any:
            return state if state is None or dist.get_rank() == 0 else {}

        def _save_state(self, checkpoint: str, state: Any) -> None:
            self.saved = state

        def _state_path(self, checkpoint: str) -> Path:
            return Path(checkpoint, "capo", "moments")

        def _optimizer_steps(self) -> int:
            return 0

    engine: Any = Engine()
    config = CapoConfig(**knobs)
    capo = CapoFilter(config, V, H)
    engine._step = SimpleNamespace(capo=capo) if dist.get_rank() == 0 else None
    engine._kl = SimpleNamespace(budget=KLBudget(config.kl_budget)) if config.kl_budget else None
    engine._capo = config if trains else None
    return engine, config


def moments(**changes: Any) -> dict[str, Any]:
    return {"exp_avg": torch.ones(V, H), "exp_avg_sq": torch.ones(V, H), "step": 3, **changes}


def resumes(
    control: tuple[bool, Any, Any] | None, state: Any, trains: bool, knobs: dict[str, Any]
) -> dict[str, Any]:
    """What loading and the first training step do on this rank."""
    from capo_verl.engines import checkpoint_files

    made = None if control is None else checkpoint_files.Control(*control)
    checkpoint_files.load = lambda checkpoint: made  # type: ignore[assignment]
    engine, config = make_engine(knobs, state, trains)
    watched = [x for x in (engine._step, engine._kl) if x is not None]
    before, said = contents(watched), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("capo_verl")
    logger.addHandler(handler)
    error = ""
    try:
        engine.load_checkpoint(PATH)
        if not trains:
            engine._take_over_loaded(config)
    except RuntimeError as e:
        error = str(e)
    logger.removeHandler(handler)
    found = {"error": error, "changed": contents(watched) != before, "said": " ".join(said)}
    found |= {"weights": engine.weights, "steps_before": engine._steps_before}
    if engine._step is not None:
        found |= {"threshold": engine._step.capo.adaptive_state().get("threshold_quantile")}
        found |= {"updates": engine._step.capo.state_dict().get("step")}
    found["rate"] = None if engine._kl is None else engine._kl.budget.rate
    kept = engine._loaded
    found["kept"] = (kept.control is not None, kept.state is not None)
    return found


BUDGET = {"curvature": 1.0, "measured": 2, "floor": 1e-9, "rate": 0.5}
BAD: list[tuple[Any, Any, str]] = [
    ((True, {"scale": 2.0}, GOOD), moments(), "control.json cannot be used .*scale=2.0, expected"),
    ((True, {"scale": "1"}, GOOD), moments(), "control.json .*scale='1', expected a positive"),
    ((True, {"rate": 0.5}, GOOD), moments(),
     "control.json .*expected the keys curvature, measured, floor, rate, got rate"),
    ((True, BUDGET, {"threshold_steps": "x"}), moments(),
        "control.json .*threshold_steps='x' is not a finite number"),
    ((True, BUDGET, {**GOOD, "filter_stopped": 7}), moments(),
        "control.json .*filter_stopped=7 is not an integer"),
    ((True, BUDGET, {**GOOD, "other": 1.0}), moments(), "control.json .*other is unknown"),
    ((True, BUDGET, GOOD), moments(step=-1), "moments cannot be used .*step=-1 is"),
    ((True, BUDGET, GOOD), moments(exp_avg=torch.zeros(V, H) + torch.inf),
        "moments cannot be used .*exp_avg holds non-finite values"),
    ((True, BUDGET, GOOD), moments(exp_avg=torch.zeros(V, 2)),
        r"moments cannot be used .*exp_avg has shape \(10, 2\)"),
    ((True, BUDGET, GOOD), None, "moments cannot be used .it is missing."),
]  # fmt: skip


def all_of(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [resumes(*case) for case in cases]


SGD = {**KNOBS, "optimizer_model": "sgd"}
CASES: dict[Any, tuple[Any, ...]] = {
    **{(message, trains): (control, state, trains, KNOBS)
        for control, state, message in BAD for trains in (False, True)},
    **{trains: ((True, BUDGET, GOOD), moments(), trains, KNOBS)
        for trains in (False, True)},
    "before 0.2": ((True, BUDGET, {"policy_threshold": 2e-4}), moments(), False, KNOBS),
    "no moments": ((False, BUDGET, GOOD), None, False, KNOBS),
    "no moments, sgd": ((False, BUDGET, GOOD), None, False, SGD),
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[Any, tuple[dict[str, Any], dict[str, Any]]]:
    ranks = run_on_ranks(all_of, 2, list(CASES.values()))
    return dict(zip(CASES, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("message", [message for _, _, message in BAD])
@pytest.mark.parametrize("trains", [False, True])
def test_a_part_that_cannot_be_used_leaves_all_as_it_was(message, trains, found):
    first, second = found[message, trains]
    assert first["error"] == second["error"]
    assert re.match(rf"the CAPO state in {PATH}/capo/{message}", first["error"])
    for rank in (first, second):
        assert not rank["changed"]
        if trains or "missing" in message:
            assert rank["weights"] == "before" and rank["kept"] == (False, False)
        else:  # it is still there, for the next checkpoint
            assert rank["kept"] == (True, True)
    assert first["threshold"] is None and first["updates"] == 0 and first["rate"] is None


@pytest.mark.parametrize("trains", [False, True])
def test_all_of_it_is_taken_over(trains, found):
    first, second = found[trains]
    assert first["error"] == second["error"] == first["said"] == second["said"] == ""
    assert (first["threshold"], first["updates"], first["rate"]) == (2e3, 3, 0.5)
    assert second["rate"] == 0.5 and first["steps_before"] == second["steps_before"] == 3
    assert first["kept"] == second["kept"] == (False, False)


def test_a_threshold_that_does_not_name_its_rate_is_found_anew(found):
    first, _ = found["before 0.2"]
    assert (first["error"], first["threshold"], first["updates"]) == ("", None, 3)
    assert "holds a threshold of a release before 0.2" in first["said"]


def test_a_threshold_does_not_outlive_its_moments(found):
    """Without moments the shifts are on another scale: of a run with optimizer_model=sgd."""
    first, _ = found["no moments"]
    assert (first["threshold"], first["updates"], first["rate"]) == (None, 0, 0.5)
    assert "its moments start empty" in first["said"] and "they start anew" in first["said"]
    first, _ = found["no moments, sgd"]
    assert first["threshold"] == 2e3 and first["said"] == ""
