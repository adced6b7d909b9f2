# SPDX-License-Identifier: Apache-2.0
"""The KL budget around an engine that does nothing else: who is probed, what is learned from it,
what is left as it was.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import verl  # noqa: F401  plugins first

from capo_verl import CapoConfig
from capo_verl.core import ProjectedLogits
from capo_verl.core.logits import VocabShard
from capo_verl.core.token_kl import token_kl
from capo_verl.engines.kl_control import KLControl
from capo_verl.engines.kl_probe import AFTER, BEFORE, KLProbe, MeasuredKL, probe_samples
from capo_verl.engines.lm_head import LMHead
from capo_verl.engines.response import PackedResponse
from tests.helpers.spawn import run_on_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "share", "multiple", "expected"),
    [
        (8, 0.5, 1, [0, 2, 4, 6]),
        (8, 0.125, 1, [0]),
        (10, 0.25, 1, [0, 3, 6]),
        (3, 0.01, 1, [0]),
        (6, 1.0, 1, [0, 1, 2, 3, 4, 5]),
        (8, 0.125, 4, [0, 2, 4, 6]),
        (2, 0.5, 4, [0, 1]),
        (10, 0.3, 1, [0, 3, 6]),  # 10 * 0.3 is 3.0000000000000004
    ],
)
def test_samples_are_spread_evenly(samples, share, multiple, expected):
    assert probe_samples(samples, share, multiple) == expected


class Engine:
    """One parameter group; the KL after each step comes from a list."""

    def __init__(self, **budget: Any):
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.02}])
        config = CapoConfig(mode="off", kl_budget={"delta": 1e-4, "eta": 0.2, **budget})
        self.control = KLControl(self, config, None, CPU)
        self.kls: list[MeasuredKL] = []
        self.spread = 0
        self.control._look = lambda which: self.kls.pop(0) if which == AFTER else None

    def _optimised(self) -> list[torch.Tensor]:
        return [self.weight.data]

    def _spread_parameters(self) -> None:
        self.spread += 1

    def _micro_batch_groups(self) -> int:
        return 1

    def _evaluating(self) -> Any:
        return nullcontext()

    def step(self, *kls: float, tokens: int = 5) -> dict[str, list[float]]:
        self.kls = [MeasuredKL(kl, 2 * kl, tokens) for kl in kls]
        self.control._metrics = {}
        with self.control.scaled():
            self.rates = [group["lr"] for group in self.optimizer.param_groups]
            self.control.keep_parameters()
            self.weight.data += 1.0
            self.control.stepped = True
        return self.control.after()


def test_only_the_step_sees_the_scaled_learning_rate():
    engine = Engine()
    first = engine.step(4e-4)
    assert engine.rates == [0.1, 0.02] and first["capo/lr_scale"] == [1.0]
    scale = math.exp(-0.2 * math.log(2))
    second = engine.step(1e-4)
    assert engine.rates == pytest.approx([0.1 * scale, 0.02 * scale])
    assert second["capo/lr_scale"] == [pytest.approx(scale)] == second["capo/kl_budget_scale"]
    assert second["capo/kl_mean"] == [1e-4] and second["capo/kl_p99"] == [2e-4]
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.1, 0.02]
    with pytest.raises(RuntimeError, match="out of memory"), engine.control.scaled():
        raise RuntimeError("out of memory")
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.1, 0.02]


def test_without_a_probed_token_nothing_is_learned():
    engine = Engine()
    engine.step(4e-4)
    scale = engine.control.budget.scale
    metrics = engine.step(0.0, tokens=0)
    assert engine.control.budget.scale == scale and "capo/kl_mean" not in metrics


def test_a_step_that_was_left_out_is_not_measured():
    engine = Engine()
    with engine.control.scaled():
        engine.control.stepped = False
    assert set(engine.control.after()) == {"capo/kl_budget_scale", "capo/kl_probe_seconds"}
    assert engine.control.budget.scale == 1.0


def test_nan_stops_the_run():
    with pytest.raises(ValueError, match="kl is NaN"):
        Engine().step(math.nan)


def test_a_rate_at_its_floor_is_told_once(caplog):
    engine = Engine(scale_min=0.5)
    for _ in range(3):
        engine.step(1.0)  # 0.82, 0.67, 0.55 of the rate
    assert not caplog.records
    for _ in range(3):
        engine.step(1.0)
    (record,) = caplog.records
    assert "scale_min=0.5" in record.getMessage() and "KL of 1.0e+00" in record.getMessage()
    below = Engine(scale_min=0.5)
    below.control.budget.load_state_dict({"scale": 0.5})
    below.step(1e-5)
    assert len(caplog.records) == 1


def test_line_search_goes_back_until_the_step_is_short_enough():
    engine = Engine(line_search=2.0)
    metrics = engine.step(1e-2, 4e-4, 1.5e-4)
    assert metrics["capo/kl_step_kept"] == [pytest.approx(0.1 * 0.5)]
    assert engine.weight.tolist() == pytest.approx([1.05, 2.05]) and engine.spread == 2
    assert metrics["capo/kl_mean"] == [1.5e-4] and metrics["capo/kl_whole_step"] == [1e-2]
    assert engine.control.budget.scale == pytest.approx(
        math.exp(-0.2)
    )  # learned from the whole step
    assert engine.step(1e-4)["capo/kl_step_kept"] == [1.0] and engine.spread == 2
    assert engine.step(1.0, 1.0, 1.0, 1.0)["capo/kl_step_kept"] == [
        pytest.approx(1e-6)
    ]  # gives up after three


def lm_head(shard: VocabShard, **groups: Any) -> LMHead:
    module = torch.nn.Linear(2, shard.rows)
    return LMHead(module, module, shard, 2, **groups)


def logits_of(step: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 12, 7, generator=generator)
    return (
        old,
        old + step * torch.randn(1, 12, 7, generator=generator),
        torch.rand(1, 12, generator=generator) + 0.5,
    )


def measure() -> list[MeasuredKL]:
    """Rank 0 holds tokens, rank 1 none, rank 2 no LM head; then nobody holds any."""
    rank, (old, new, temperature) = dist.get_rank(), logits_of(0.1)
    heads = dist.new_group([0, 1])
    head = lm_head(VocabShard(7, 7, 0), dp_group=heads) if rank < 2 else None
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 2:9] = rank == 0
    probe, found = KLProbe(head, "exact", CPU), []
    for tokens in (mask, torch.zeros_like(mask)):
        response = PackedResponse(
            mask.float(), tokens, torch.zeros(1, 12).long(), torch.zeros(1).long(), 12
        )
        for which, logits in ((BEFORE, old), (AFTER, new), (AFTER, new)):
            with probe.running(which):
                if probe.sees_logits:
                    probe.see(logits.clone(), None, temperature, response)
        found.append(probe.result())
    return found


def test_ranks_without_tokens_or_head_learn_what_the_others_measured():
    old, new, temperature = logits_of(0.1)
    kl = token_kl(
        *(x[0, 2:9].double() for x in (old, new)),
        VocabShard(7, 7, 0),
        temperature=temperature[0, 2:9].double(),
    )
    for some, none in run_on_ranks(measure, 3):
        assert some.mean == pytest.approx(float(kl.mean()), rel=1e-5) and some.tokens == 7
        assert some.p99 == pytest.approx(float(kl.max()), rel=1e-5)
        assert none == MeasuredKL(0.0, 0.0, 0)


def test_a_fused_head_is_not_rounded_to_bfloat16(monkeypatch):
    """Small KLs: exact from bfloat16 hidden states and weights, inflated from bfloat16 logits."""
    monkeypatch.setattr(
        "capo_verl.core.logits.block_elements", lambda device: 1 << 14
    )  # several runs of rows
    generator = torch.Generator().manual_seed(1)
    hidden = (3 * torch.randn(1, 40, 64, generator=generator)).bfloat16()
    weights = [torch.randn(1000, 64, generator=generator).bfloat16()]
    weights.append(
        (weights[0].float() + 2e-3 * torch.randn(1000, 64, generator=generator).sign()).bfloat16()
    )
    ones, none = torch.ones(1, 40), torch.zeros(1, 40).long()
    response = PackedResponse(ones, ones.bool(), none, torch.zeros(1).long(), 40)

    def kl(fused: bool) -> float:
        probe = KLProbe(lm_head(VocabShard(1000, 1000, 0), dp_group=None), "exact", CPU)
        for which, weight in zip((BEFORE, AFTER), weights, strict=True):
            with probe.running(which):
                probe.see(
                    ProjectedLogits(weight) if fused else hidden @ weight.T, hidden, ones, response
                )
        kls, _ = probe._found[0]
        return float(kls.mean())

    exact = float(
        token_kl(
            *(hidden[0].double() @ w.double().T for w in weights), VocabShard(1000, 1000, 0)
        ).mean()
    )
    assert 1e-6 < exact < 1e-3
    assert kl(fused=True) == pytest.approx(exact, rel=1e-3)
    assert kl(fused=False) > 2 * exact
