# SPDX-License-Identifier: Apache-2.0
"""The KL budget inside verl's Megatron engine, layout by layout, against a float64 Hugging Face
model.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.kl_cases import PROBED, Trained, adaptive, knobs_of, mini_batches, train
from tests.engines.megatron.replay_cases import Case, once_per_model
from tests.helpers.grouped import launch_by_size
from tests.helpers.kl_recording import (
    ADAM_LR,
    DELTA,
    ETA,
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
]


@pytest.fixture(scope="module")
def recording_of(models):
    return once_per_model(lambda path, *rest: record_kl(path, PROBED, *rest), models)


@pytest.fixture(scope="module")
def trained_with(request, models):
    return launch_by_size(request, train, lambda case: (case, models[case.model], knobs_of()))


def check(ranks: list[Trained], dp: int, recording: KLRecording, lr: float = ADAM_LR) -> None:
    assert len({rank.scale for rank in ranks}) == 1  # also where nothing is measured
    reporting = [rank.reports for rank in ranks if rank.reports[0]]
    assert len(reporting) == dp
    for reports in reporting:
        for report, want in zip(reports, recording.steps, strict=True):
            assert report["capo/lr_scale"] == [pytest.approx(want.factor, rel=1e-4)]
            assert report["capo/kl_mean"] == [pytest.approx(want.mean, rel=1e-4)]
            assert report["capo/kl_p99"] == [pytest.approx(want.p99, rel=1e-3)]
            assert report["capo/kl_budget_scale"] == [pytest.approx(want.scale, rel=1e-4)]
            assert report["capo/kl_probe_seconds"][0] > 0
            assert report.get("capo/kl_step_kept", [1.0]) == [pytest.approx(want.kept, rel=1e-4)]
            assert report.get("capo/kl_whole_step", report["capo/kl_mean"]) == [
                pytest.approx(want.whole, rel=1e-4)
            ]
    for rank in ranks:
        assert rank.learning_rates == [lr] * len(recording.steps)
        for name, weight in (rank.weights or {}).items():
            np.testing.assert_allclose(weight.numpy(), recording.weights[name], rtol=0, atol=2e-6)


def test_the_recording_moves_the_scale(recording_of):
    steps = recording_of(CASES[0]).steps
    assert steps[0].factor == 1.0 and steps[0].scale < 0.7 and steps[1].scale < 0.9 * steps[0].scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(case: Case, trained_with, recording_of) -> None:
    check(trained_with(case), case.layout.dp, recording_of(case))


def on_ranks(function, case: Case, *args):
    return run_on_ranks(function, case.layout.world_size, case, *args, preload=ENGINE_MODULES)


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2, distributed_optimizer=True)], ids=str
)
def test_line_search_steps_back_to_the_budget(layout, models):
    expected = record_kl(models["untied"], PROBED, line_search=1.2)
    assert sum(step.kept < 0.9 for step in expected.steps) >= 2
    assert all(step.mean < 1.1 * DELTA for step in expected.steps if step.kept < 1)
    ranks = on_ranks(train, Case(layout), models["untied"], knobs_of(line_search=1.2))
    check(ranks, layout.dp, expected)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(pp=2)], ids=str)
def test_k3_of_several_mini_batches(layout, models):
    start = log_probs_of(models["untied"])
    ranks = on_ranks(mini_batches, Case(layout), models["untied"], [x.float() for x in start])
    weights = next(rank["weights"] for rank in ranks if rank["weights"])["all"]
    policies = [log_probs_of(models["untied"], each) for each in weights]
    first = mean_k3(policies[0], policies[1], (0, 2))
    second = mean_k3(policies[1], policies[2], (4, 6))
    third = mean_k3(policies[2], policies[3], (0, 2))
    (reports,) = [rank["reports"] for rank in ranks if rank["reports"][0]]
    found = [report["capo/kl_mean"] for report in reports]
    assert found == [[pytest.approx(kl, rel=1e-3)] for kl in (first, second, third)]
    scales = [1.0]
    for kl in (first, second, third):
        scales.append(min(1.0, scales[-1] * np.exp(ETA * np.clip(0.5 * np.log(DELTA / kl), -1, 1))))
    assert len({rank["scale"] for rank in ranks}) == 1
    assert ranks[0]["scale"] == pytest.approx(scales[3], rel=1e-3)
    assert [report["capo/lr_scale"][0] for report in reports] == pytest.approx(scales[:3], rel=1e-3)


def test_the_filter_sees_the_scaled_learning_rate(models):
    """m_F is proportional to the square of it: at the same weights, the second step's follows the
    scale.
    """
    knobs = {
        **knobs_of(),
        "mode": "track",
        "top_k": 20,
        "optimizer_model": "sgd",
        "batch_shift_every": 1,
    }
    budget = {**knobs["kl_budget"], "delta": 1e-30, "eta": 1.0}
    (with_budget,) = on_ranks(
        adaptive, Case(Layout()), models["untied"], {**knobs, "kl_budget": budget}, 1
    )
    (scaled,) = on_ranks(at_scale, Case(Layout()), models["untied"], knobs, 0.25)
    first = with_budget[0]["report"]["capo/policy_shift_mean"][0]
    assert scaled["capo/policy_shift_mean"] == [pytest.approx(first / 16, rel=1e-6)]


def at_scale(case: Case, model_path: str, knobs: dict, scale: float) -> dict:
    """A step of an engine whose controller starts at ``scale``."""
    from tests.engines.megatron.kl_cases import batch_of, make, step

    engine = make(case, model_path)
    data = batch_of(engine, case)
    from capo_verl.engines.mixin import capo_config_of
    from tests.engines.megatron.capo_cases import make_loss

    engine._switch_on(capo_config_of(make_loss("capo", knobs)))
    engine._kl.budget.scale = scale
    return step(engine, data, knobs)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(packed=False)], ids=str)
def test_a_budget_that_never_binds_trains_bit_for_bit_like_verls_engine(layout, models):
    """Probes and scaling by 1 leave no trace; nor does ``mode=off`` alone, which reports
    nothing.
    """
    case = Case(layout)
    loose, off, plain = (
        on_ranks(train, case, models["untied"], knobs)
        for knobs in (knobs_of(delta=1e9), {"mode": "off"}, None)
    )
    for a, b, c in zip(loose, off, plain, strict=True):
        assert all(
            torch.equal(a.weights[n], c.weights[n]) and torch.equal(b.weights[n], c.weights[n])
            for n in c.weights
        )
        for reports in (b.reports, c.reports):
            assert not any("capo/" in name for report in reports for name in report)
    assert all(report["capo/lr_scale"] == [1.0] for report in loose[0].reports)
