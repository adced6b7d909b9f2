# SPDX-License-Identifier: Apache-2.0
"""What the mixin adds to an engine of verl, on an engine that does nothing else."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import verl  # noqa: F401  plugins first
from torch import nn

from capo_verl import CapoConfig
from capo_verl.core.logits import VocabShard
from capo_verl.engines import mixin
from capo_verl.engines.lm_head import LMHead
from capo_verl.engines.mixin import CapoEngineMixin
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks


class Engine:
    """verl's part: remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1, "params": []}])

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


def switched_on(without: tuple[int, ...]) -> tuple[str, bool]:
    """What a rank is told, where those ranks have no parameter groups, and if it is a run with
    CAPO.
    """
    mixin.get_device_id = lambda: "cpu"
    engine = CapoEngine()
    if torch.distributed.get_rank() in without:
        engine.optimizer.param_groups = []
    try:
        engine._switch_on(CapoConfig(top_k=4))
    except ValueError as refusal:
        return str(refusal), engine._capo is not None or engine._step is not None
    return "", engine._capo is not None


@pytest.mark.parametrize(("without", "named"), [((1,), "1"), ((0, 2), "0, 2")])
def test_a_rank_without_parameter_groups_is_refused_on_all_ranks(without, named):
    refusal = (
        f"the optimizer has no parameter groups on rank {named}, so there is no learning rate to "
        "read: freeze fewer parameters, or choose another "
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size"
    )
    assert run_on_ranks(switched_on, 3, without, preload=ENGINE_MODULES) == [(refusal, False)] * 3


def test_empty_parameter_groups_are_accepted():
    assert run_on_ranks(switched_on, 2, (), preload=ENGINE_MODULES) == [("", True)] * 2


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("engine", ["fsdp.engine.CapoFSDP", "megatron.engine.CapoMegatron"])
def test_the_rate_of_an_empty_group_is_read_as_a_number(engine, rate):
    """Megatron's groups are the same on all ranks, also where a rank holds none of a group's
    parameters; a capturable Adam keeps the rate in a tensor.
    """
    module, name = f"capo_verl.engines.{engine}EngineWithLMHead".rsplit(".", 1)
    groups = [{"lr": rate, "params": []}, {"lr": 0.3, "params": [torch.zeros(1)]}]
    optimizer = SimpleNamespace(param_groups=groups)
    read = getattr(importlib.import_module(module), name)._learning_rate
    found = read(SimpleNamespace(optimizer=optimizer))
    assert type(found) is float and found == 0.1


def test_a_loss_scaler_is_refused():
    """float16 in whatever spelling verl knows."""
    fsdp = importlib.import_module("capo_verl.engines.fsdp.engine").CapoFSDPEngineWithLMHead
    config = CapoConfig(top_k=4)
    fsdp._check_supported(SimpleNamespace(scaler=None), config)
    with pytest.raises(ValueError, match="does not support float16 with FSDP: .* set .*=bf16"):
        fsdp._check_supported(SimpleNamespace(scaler=object()), config)
