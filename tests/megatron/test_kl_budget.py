# SPDX-License-Identifier: Apache-2.0
"""The KL budget inside verl's Megatron engine, layout by layout, against a float64 Hugging Face model."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpu.engine_cases import Layout
from tests.helpers.grouped import launch_by_size
from tests.helpers.kl_recording import ADAM_LR, KLRecording, record_kl
from tests.helpers.tiny_model import make_tiny_model
from tests.megatron.kl_cases import PROBED, Trained, knobs_of, train
from tests.megatron.replay_cases import Case

PRELOAD = ("torch", "verl.workers.engine.megatron.transformer_impl", "capo_verl.cpu.bridge")
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
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {"untied": {}, "odd-vocabulary": {"vocab_size": 125}}
    return {
        name: make_tiny_model(
            tmp_path_factory.mktemp(name), layers=4, num_attention_heads=8, num_key_value_heads=4, **options
        )
        for name, options in made.items()
    }


@pytest.fixture(scope="module")
def recording_of(models):
    recordings: dict[tuple, KLRecording] = {}

    def get(case: Case) -> KLRecording:
        padded_rows = -125 % case.layout.tp if case.model == "odd-vocabulary" else 0
        key = (case.model, case.temperature, padded_rows)
        if key not in recordings:
            recordings[key] = record_kl(models[case.model], PROBED, case.temperature, padded_rows)
        return recordings[key]

    return get


@pytest.fixture(scope="module")
def trained_with(request, models):
    return launch_by_size(request, train, lambda case: (case, models[case.model], knobs_of()), preload=PRELOAD)


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
