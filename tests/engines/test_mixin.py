# SPDX-License-Identifier: Apache-2.0
"""What the mixin adds to an engine of verl, on an engine that does nothing else."""

from __future__ import annotations

import verl  # noqa: F401  plugins first
from torch import nn

from capo_verl import CapoConfig
from capo_verl.core.logits import VocabShard
from capo_verl.engines import mixin
from capo_verl.engines.lm_head import LMHead
from capo_verl.engines.mixin import CapoEngineMixin


class Engine:
    """verl's part: remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def to(self, **what: object) -> None:
        self.calls.append(("to", what))


class CapoEngine(CapoEngineMixin, Engine):
    def _find_lm_head(self):
        return LMHead(nn.Identity(), nn.Identity(), VocabShard(8, 8, 0), 3)


def where(engine: CapoEngine) -> set[str]:
    model = engine._step.capo.model
    return {x.device.type for x in (model.exp_avg, model.exp_avg_sq)}


def test_moments_move_with_the_optimizers_state(monkeypatch):
    monkeypatch.setattr(mixin, "get_device_id", lambda: "cpu")
    engine = CapoEngine()
    engine._switch_on(CapoConfig(top_k=4))
    engine.to(device="cpu", model=True, optimizer=True, grad=True)
    assert where(engine) == {"cpu"}
    monkeypatch.setattr(
        mixin, "get_device_id", lambda: "meta"
    )  # the "GPU", which this machine has as well
    engine.to(device="cuda", model=True, optimizer=False, grad=True)  # param_offload alone
    assert where(engine) == {"cpu"}
    engine.to(device="cuda", model=False, optimizer=True, grad=False)
    assert where(engine) == {"meta"}
    assert [what["optimizer"] for _, what in engine.calls] == [
        True,
        False,
        True,
    ]  # verl's own part is done as well


def test_before_the_first_training_step_there_is_nothing_to_move():
    engine = CapoEngine()
    engine.to(device="cpu")
    assert engine.calls == [
        ("to", {"device": "cpu", "model": True, "optimizer": True, "grad": True})
    ]
