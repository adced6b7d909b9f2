# SPDX-License-Identifier: Apache-2.0
"""The KL budget around an engine that does nothing else: who is probed, what is learned from it,
what is left as it was.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import verl  # noqa: F401  plugins first
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from capo_verl import CapoConfig
from capo_verl.core import ProjectedLogits
from capo_verl.core.logits import VocabShard
from capo_verl.core.token_kl import token_kl
from capo_verl.engines.kl_control import KLControl
from capo_verl.engines.kl_probe import (
    AFTER,
    BEFORE,
    PROBED,
    KLProbe,
    MeasuredKL,
    Selection,
    place_of,
    probed_rows,
    select,
)
from capo_verl.engines.lm_head import LMHead
from capo_verl.engines.response import PackedResponse, choose_tokens
from capo_verl.engines.timer import Timer
from tests.helpers.spawn import run_on_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("micro_batches", "share", "multiple", "expected"),
    [
        ([2, 2, 2, 2], 0.5, 1, [(0, [0, 1]), (2, [4, 5])]),
        ([1] * 8, 0.25, 1, [(0, [0]), (4, [4])]),
        ([1] * 8, 0.125, 4, [(0, [0]), (2, [2]), (4, [4]), (6, [6])]),
        ([1] * 10, 0.3, 1, [(0, [0]), (3, [3]), (6, [6])]),  # 10 * 0.3 is 3.0000000000000004
        ([8], 0.25, 1, [(0, [0, 4])]),  # a part of the only one
        ([4, 4], 0.25, 1, [(0, [0, 2])]),
        ([3, 1], 1.0, 1, [(0, [0, 1, 2]), (1, [3])]),
        ([3], 0.01, 1, [(0, [0])]),
        ([1, 1], 0.5, 4, [(0, [0]), (1, [1])]),
    ],
)
def test_what_is_probed_is_spread_evenly(micro_batches, share, multiple, expected):
    ends = np.cumsum(micro_batches)
    partition = [list(range(end - n, end)) for end, n in zip(ends, micro_batches, strict=True)]
    assert probed_rows(partition, share, multiple) == expected


def mini_batch(lengths: list[int], nested: bool) -> TensorDict:
    """Samples whose tokens are numbered; the first of each response does not count."""
    masks = [torch.tensor([0] + [1] * (n - 1)) for n in lengths]
    ids = [100 * i + torch.arange(n) for i, n in enumerate(lengths)]
    jagged = [torch.nested.as_nested_tensor(x, layout=torch.jagged) for x in (masks, ids)]
    mask = jagged[0] if nested else torch.nested.to_padded_tensor(jagged[0], 0)
    return TensorDict({"response_mask": mask, "input_ids": jagged[1]}, batch_size=[len(lengths)])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("indices", [None, [[3, 1], [0, 2]]])
def test_the_second_pass_runs_the_samples_of_the_first(nested, indices):
    data = mini_batch([4, 3, 5, 2], nested)
    parts = indices or [[0, 1], [2, 3]]
    micro_batches = [tu.index_select_tensor_dict(data, part) for part in parts]
    found = select(data, micro_batches, indices, share=0.5, multiple=1, limit=4)
    assert [PROBED in micro_batch for micro_batch in micro_batches] == [True, False]
    chosen, count = parts[0], 4 if indices is None else 3
    assert found.indices == [[0, 1]] and len(found.batch) == 2
    for batch in (micro_batches[0], found.micro_batches[0], found.batch):
        ids = [x.tolist() for x in batch["input_ids"].unbind()]
        assert ids == [(100 * i + torch.arange(n)).tolist() for i, n in
                       ((i, [4, 3, 5, 2][i]) for i in chosen)]  # fmt: skip
        assert int(batch[PROBED].values().sum() if nested else batch[PROBED].sum()) == count
    assert place_of(micro_batches[0]) == place_of(found.micro_batches[0]) == (0, count)


def test_at_most_so_many_tokens_are_kept_evenly_spread():
    mask = mini_batch([5, 9, 4], nested=False)["response_mask"]
    assert choose_tokens(mask, [1, 2], 100).sum(-1).tolist() == [0, 8, 3]
    some = choose_tokens(mask, [1, 2], 4)
    assert some[1].nonzero()[:, 0].tolist() == [1, 3, 6] and some[2].nonzero().tolist() == [[1]]
    head = lm_head(VocabShard(152064, 38016, 0))
    assert KLProbe(head, "exact", CPU, Timer(CPU)).limit == 1765  # 256 MiB of float32


class Engine:
    """One parameter group; the KL after each step comes from a list."""

    def __init__(self, total_training_steps: int = -1, **budget: Any):
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.02}])
        self.optimizer_config = SimpleNamespace(lr=0.1, total_training_steps=total_training_steps)
        config = CapoConfig(mode="off", kl_budget={"delta": 1e-4, "eta": 0.2, **budget})
        self.control = KLControl(self, config, None, CPU)
        self.kls: list[MeasuredKL] = []
        self.spread = self.trained = 0
        self.control._look = lambda: self.kls.pop(0)

    def _learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _training_steps(self) -> int:
        return self.trained

    def _has_dropout(self) -> bool:
        return False

    def _optimised(self) -> list[torch.Tensor]:
        return [self.weight.data]

    def _spread_parameters(self) -> None:
        self.spread += 1

    def step(self, *kls: float, tokens: int = 5) -> dict[str, list[float]]:
        self.kls = [MeasuredKL(kl, 2 * kl, tokens) for kl in kls]
        with self.control.scaled(32):
            self.rates = [group["lr"] for group in self.optimizer.param_groups]
            self.control._selection = Selection(TensorDict({}, []), [], [])
            self.control.before_step()
            self.weight.data += 1.0
            self.control.stepped = True
        self.trained += 1
        return self.control.after()

    def started(self) -> Engine:
        """After a step in which rounding measures 1e-9, and one at 1e-3 with a KL of 1e-6."""
        self.control.budget.load_state_dict(
            {"curvature": 1.0, "measured": 9, "floor": 1e-9, "rate": 1e-3}
        )
        return self


def test_only_the_step_sees_the_budgets_learning_rate():
    engine = Engine()
    first = engine.step(1e-9)
    assert engine.rates == pytest.approx([1e-7, 2e-8]) and first["capo/lr"] == [1e-7]
    assert first["capo/kl_floor"] == [1e-9] and "capo/kl_curvature" not in first
    second = engine.step(1e-7)
    assert engine.rates == pytest.approx([1e-6, 2e-7])
    assert second["capo/lr"] == [pytest.approx(1e-6)] and second["capo/kl_delta"] == [1e-4]
    assert second["capo/kl_mean"] == [1e-7] and second["capo/kl_p99"] == [2e-7]
    assert second["capo/kl_curvature"] == [pytest.approx(0.99e-7 / 1e-12)]
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.1, 0.02]
    with pytest.raises(RuntimeError, match="out of memory"), engine.control.scaled(32):
        raise RuntimeError("out of memory")
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.1, 0.02]


def test_the_budget_decays_over_the_steps_of_the_run():
    engine = Engine(total_training_steps=3).started()
    assert [engine.step(1e-4)["capo/kl_delta"][0] for _ in range(4)] == pytest.approx(
        [1e-4, 0.55e-4, 0.1e-4, 0.1e-4]
    )


def test_without_a_probed_token_nothing_is_learned():
    engine = Engine().started()
    state = engine.control.budget.state_dict()
    metrics = engine.step(0.0, tokens=0)
    assert engine.control.budget.state_dict() == state and "capo/kl_mean" not in metrics


def test_a_step_that_was_left_out_is_not_measured():
    engine = Engine()
    with engine.control.scaled(32):
        engine.control.stepped = False
    assert set(engine.control.after()) == {"capo/kl_probe_seconds"}
    assert engine.control.budget.rate is None


def test_nan_stops_the_run():
    with pytest.raises(ValueError, match="kl is NaN"):
        Engine().step(math.nan)


def test_a_budget_below_the_floor_is_told_once(caplog):
    engine = Engine()
    engine.step(2e-4)
    assert not caplog.records
    for _ in range(3):
        engine.step(1e-2)
    (record,) = caplog.records
    assert "KL budget of a step, 1.0e-04" in record.getMessage()
    assert "measures 2.0e-04" in record.getMessage() and "below 6.0e-04" in record.getMessage()


def test_line_search_goes_back_until_the_step_is_short_enough():
    engine = Engine(line_search=2.0).started()
    metrics = engine.step(1e-2, 4e-4, 1.5e-4)
    assert metrics["capo/kl_step_kept"] == [pytest.approx(0.1 * 0.5)]
    assert engine.weight.tolist() == pytest.approx([1.05, 2.05]) and engine.spread == 2
    assert metrics["capo/kl_mean"] == [1.5e-4] and metrics["capo/kl_whole_step"] == [1e-2]
    # Learned from the whole step, which was made at sqrt(1e-4 / 1).
    assert engine.control.budget.curvature == pytest.approx(1 + 0.2 * (1e-2 / 1e-4 - 1), rel=1e-6)
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
    probe, found = KLProbe(head, "exact", CPU, Timer(CPU)), []
    for tokens in (mask, torch.zeros_like(mask)):
        response = PackedResponse(
            mask.float(), tokens, torch.zeros(1, 12).long(), torch.zeros(1).long(), 12
        )
        for which, logits in ((BEFORE, old), (AFTER, new), (AFTER, new)):
            with probe.running(which):
                if probe.sees_logits:
                    probe.see(logits.clone(), None, temperature, response, 0)
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
        probe = KLProbe(lm_head(VocabShard(1000, 1000, 0), dp_group=None), "exact", CPU, Timer(CPU))
        for which, weight in zip((BEFORE, AFTER), weights, strict=True):
            with probe.running(which):
                probe.see(
                    ProjectedLogits(weight) if fused else hidden @ weight.T,
                    hidden,
                    ones,
                    response,
                    0,
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
