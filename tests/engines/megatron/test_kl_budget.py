# SPDX-License-Identifier: Apache-2.0
"""The KL budget inside verl's Megatron engine, layout by layout, against a float64 Hugging Face
model.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.kl_cases import (
    PROBED,
    Trained,
    gather_under_way,
    knobs_of,
    mini_batches,
    train,
)
from tests.engines.megatron.replay_cases import Case, once_per_model
from tests.helpers.grouped import launch_by_size
from tests.helpers.kl_recording import (
    ADAM_LR,
    DELTA,
    KLRecording,
    log_probs_of,
    mean_k3,
    record_kl,
)
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

CASES = [
    Case(Layout()),
    Case(Layout(packed=False), temperature=0.7),
    Case(Layout(), micro_batch="dynamic", pad=64),
    Case(Layout(), fused=True),
    Case(Layout(tp=2), model="odd-vocabulary"),
    Case(Layout(tp=2, sp=True, packed=False)),
    Case(Layout(tp=2, sp=True), temperature=0.7, fused=True),
    Case(Layout(pp=2), micro_batch=1),
    Case(Layout(pp=2, vpp=2)),
    Case(Layout(dp=2), micro_batch="dynamic"),
    Case(Layout(dp=2, distributed_optimizer=True)),
    Case(Layout(cp=2), micro_batch=1),
    Case(Layout(cp=2, packed=False)),
    Case(Layout(cp=2), fused=True),
    Case(Layout(tp=2, dp=2, sp=True, distributed_optimizer=True)),
    Case(Layout(tp=2, cp=2, sp=True), fused=True),
    Case(Layout(pp=2, dp=2)),
    Case(Layout(dp=2, ep=2, distributed_optimizer=True), model="experts"),
    Case(Layout(tp=2, sp=True, ep=2, etp=1), model="experts", micro_batch="dynamic"),
    Case(Layout(dp=2, ep=2), model="experts", replay=True),
]
DISTRIBUTED = Layout(dp=2, distributed_optimizer=True)


@pytest.fixture(scope="module")
def recording_of(models):
    return once_per_model(lambda path, *rest, **how: record_kl(path, PROBED, *rest, **how), models)


@pytest.fixture(scope="module")
def trained_with(request, models):
    return launch_by_size(request, train, lambda case: (case, models[case.model], knobs_of()))


def check(ranks: list[Trained], dp: int, recording: KLRecording, lr: float = ADAM_LR) -> None:
    assert all(rank.state == ranks[0].state for rank in ranks)  # also where nothing is measured
    reporting = [rank.reports for rank in ranks if rank.reports[0]]
    assert len(reporting) == dp
    for reports in reporting:
        for i, (report, want) in enumerate(zip(reports, recording.steps, strict=True)):
            if i == 0:  # so short that float32 rounds it
                assert report["capo/kl_mean"] == [pytest.approx(want.mean, rel=0.1)]
                assert report["capo/lr"] == [want.rate]
                continue
            assert report["capo/lr"] == [pytest.approx(want.rate, rel=1e-4)]
            assert report["capo/kl_mean"] == [pytest.approx(want.mean, rel=1e-4)]
            assert report["capo/kl_p99"] == [pytest.approx(want.p99, rel=1e-3)]
            assert report["capo/kl_probe_seconds"][0] > 0
            assert report.get("capo/kl_step_kept", [1.0]) == [pytest.approx(want.kept, rel=1e-4)]
            assert report.get("capo/kl_whole_step", report["capo/kl_mean"]) == [
                pytest.approx(want.whole, rel=1e-4)
            ]
    for rank in ranks:
        assert rank.learning_rates == [lr] * len(recording.steps)
        for name, weight in (rank.weights or {}).items():
            np.testing.assert_allclose(weight.numpy(), recording.weights[name], rtol=0, atol=2e-6)


def test_the_recording_comes_to_the_budget(recording_of):
    steps = recording_of(CASES[0]).steps
    assert steps[0].mean < 1e-8 and steps[1].mean < 0.2 * DELTA
    assert all(0.5 * DELTA < step.mean < 2 * DELTA for step in steps[2:])
    assert steps[1].rate != steps[2].rate != steps[3].rate


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(case: Case, trained_with, recording_of) -> None:
    check(trained_with(case), case.layout.dp, recording_of(case))


HALF = (0, 1, 4, 5)
"""Samples of half of the micro-batches of two, on one data-parallel rank and on two."""


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, sp=True), Layout(dp=2, distributed_optimizer=True), Layout(cp=2)],
    ids=str,
)
def test_a_share_of_the_micro_batches(layout, models):
    expected = record_kl(models["untied"], HALF)
    ranks = on_ranks(
        train, Case(layout, micro_batch=2), models["untied"], knobs_of(probe_share=0.5)
    )
    check(ranks, layout.dp, expected)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(packed=False)], ids=str)
def test_a_part_of_the_only_micro_batch(layout, models):
    expected = record_kl(models["untied"], (0, 4))
    ranks = on_ranks(
        train, Case(layout, micro_batch=8), models["untied"], knobs_of(probe_share=0.25)
    )
    check(ranks, layout.dp, expected)


def test_with_dropout_the_policy_before_is_looked_at_by_itself(models, recording_of):
    ranks = on_ranks(train, Case(Layout(tp=2)), models["untied"], knobs_of(), None, True)
    check(ranks, 1, recording_of(CASES[0]))


def on_ranks(function, case: Case, *args):
    return run_on_ranks(function, case.layout.world_size, case, *args, preload=ENGINE_MODULES)


@pytest.mark.parametrize(
    "case",
    [
        Case(Layout(tp=2)),
        Case(Layout(pp=2)),
        Case(DISTRIBUTED),
        Case(Layout(dp=2, ep=2, distributed_optimizer=True), model="experts"),
    ],
    ids=str,
)
def test_line_search_steps_back_to_the_budget(case, models):
    path = models[case.model]
    expected = record_kl(path, PROBED, line_search=1.2, least=0.3)
    assert sum(step.kept < 0.9 for step in expected.steps) >= 2
    assert all(step.mean < 1.2 * DELTA for step in expected.steps if step.kept < 1)
    ranks = on_ranks(train, case, path, knobs_of(line_search=1.2, rate_min=0.3))
    check(ranks, case.layout.dp, expected)


def test_line_search_where_gathers_overlap(models):
    """The gather of the stepped parameters is under way when the next forward pass begins."""
    case, knobs = Case(DISTRIBUTED), knobs_of(line_search=1.2, rate_min=0.3)
    overlapping, plain = (
        on_ranks(train, case, models["untied"], knobs, None, False, settings)
        for settings in ({"override_ddp_config": {"overlap_param_gather": True}}, {})
    )
    for mine, other in zip(overlapping, plain, strict=True):
        assert mine.state == other.state
        for report, same in zip(mine.reports, other.reports, strict=True):
            assert report["capo/kl_step_kept"] == same["capo/kl_step_kept"]
            assert report["capo/kl_mean"] == same["capo/kl_mean"]


def test_a_gather_under_way_does_not_undo_a_change(models):
    ranks = on_ranks(gather_under_way, Case(DISTRIBUTED), models["untied"])
    assert ranks == [(0.25, 0.25)] * 2


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(pp=2)], ids=str)
def test_k3_of_several_mini_batches(layout, models):
    start = log_probs_of(models["untied"])
    ranks = on_ranks(mini_batches, Case(layout), models["untied"], [x.float() for x in start])
    weights = next(rank["weights"] for rank in ranks if rank["weights"])["all"]
    policies = [log_probs_of(models["untied"], each) for each in weights]
    expected = [
        mean_k3(policies[i], policies[i + 1], sequences)
        for i, sequences in enumerate((range(4), range(4, 8), range(4)))
    ]
    (reports,) = [rank["reports"] for rank in ranks if rank["reports"][0]]
    found = [report["capo/kl_mean"][0] for report in reports]
    assert found[1:] == pytest.approx(expected[1:], rel=3e-3)
    assert found[0] == pytest.approx(expected[0], rel=0.5)  # float32 rounds its log-probabilities
    assert all(rank["state"] == ranks[0]["state"] for rank in ranks)
    least = 0.1 * ADAM_LR
    curvature = (found[1] - found[0]) / least**2
    rates = [report["capo/lr"][0] for report in reports]
    assert rates == pytest.approx([1e-7, least, max(least, (DELTA / 2 / curvature) ** 0.5)])


def test_the_filter_sees_the_scaled_learning_rate(models):
    """m_F is proportional to the square of it: at the same weights, that of a first step at 1e-7 is
    that of a run with this learning rate.
    """
    knobs = {"mode": "track", "top_k": 20, "optimizer_model": "sgd", "batch_shift_every": 1}
    (with_budget,), (without,) = (
        on_ranks(shift_at, Case(Layout()), models["untied"], {**knobs, **more}, lr)
        for more, lr in (({"kl_budget": {}}, ADAM_LR), ({}, 1e-7))
    )
    assert 0 < with_budget == pytest.approx(without, rel=1e-6)


def shift_at(case: Case, model_path: str, knobs: dict, lr: float) -> float:
    """Mean m_F of a first step."""
    from tests.engines.megatron.kl_cases import batch_of, make, step

    engine = make(case, model_path)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    (shift,) = step(engine, batch_of(engine, case), knobs)["capo/policy_shift_mean"]
    return shift


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(packed=False)], ids=str)
def test_a_budget_trains_bit_for_bit_like_verls_engine_at_its_rates(layout, models):
    """Probes and scaling leave no trace; nor does ``mode=off`` alone, which reports nothing."""
    case = Case(layout)
    with_budget = on_ranks(train, case, models["untied"], knobs_of())
    rates = [report["capo/lr"][0] for report in with_budget[0].reports]
    off, plain = (
        on_ranks(train, case, models["untied"], knobs, rates) for knobs in ({"mode": "off"}, None)
    )
    for a, b, c in zip(with_budget, off, plain, strict=True):
        assert all(
            torch.equal(a.weights[n], c.weights[n]) and torch.equal(b.weights[n], c.weights[n])
            for n in c.weights
        )
        for reports in (b.reports, c.reports):
            assert not any("capo/" in name for report in reports for name in report)
    assert len(set(rates)) == len(rates)
