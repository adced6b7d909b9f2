# SPDX-License-Identifier: Apache-2.0
"""One recorded batch, every layout: the engine decides, loses and learns as one process does in
float64.

``CAPO_VERL_WRITE_MATRIX=1 pytest tests/engines/megatron/test_layouts.py`` measures the table of
docs/parallelism.md afresh.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.replay_cases import Case, once_per_model, replay
from tests.helpers.bridge import settings_of
from tests.helpers.documented_table import DocumentedTable
from tests.helpers.grouped import launch_by_size
from tests.helpers.recording import Recording, record

CASES = [
    Case(Layout()),
    Case(Layout(packed=False)),
    Case(Layout(distributed_optimizer=True)),
    Case(Layout(), micro_batch=1),
    Case(Layout(), micro_batch=8),
    Case(Layout(), micro_batch="dynamic"),
    Case(Layout(), reverse=True),
    Case(Layout(), pad=64),
    Case(Layout(packed=False), micro_batch=4),
    Case(Layout(packed=False), micro_batch=4, pad="minibatch"),
    Case(Layout(packed=False), pad=40),
    Case(Layout(packed=False), micro_batch="dynamic", reverse=True),
    Case(Layout(), temperature=0.7),
    Case(Layout(), model="tied"),
    Case(Layout(), model="odd-vocabulary"),
    Case(Layout(tp=2)),
    Case(Layout(tp=2, packed=False)),
    Case(Layout(tp=2, sp=True)),
    Case(Layout(tp=2, sp=True, packed=False), temperature=0.7),
    Case(Layout(tp=2), model="tied"),
    Case(Layout(tp=2), model="odd-vocabulary"),
    Case(Layout(pp=2), micro_batch=1),
    Case(Layout(pp=2, packed=False)),
    Case(Layout(pp=2), model="tied"),
    Case(Layout(pp=2, vpp=2)),
    Case(Layout(pp=2, vpp=2, packed=False), reverse=True),
    Case(Layout(dp=2)),
    Case(Layout(dp=2), micro_batch="dynamic"),
    Case(Layout(dp=2, distributed_optimizer=True)),
    Case(Layout(dp=2, distributed_optimizer=True, packed=False), model="tied"),
    Case(Layout(cp=2), micro_batch=1),
    Case(Layout(cp=2), micro_batch="dynamic", reverse=True),
    Case(Layout(cp=2, packed=False)),
    Case(Layout(cp=2, distributed_optimizer=True)),
    Case(Layout(tp=4)),
    Case(Layout(tp=4, sp=True, packed=False)),
    Case(Layout(tp=4), model="odd-vocabulary"),
    Case(Layout(tp=2, pp=2)),
    Case(Layout(tp=2, pp=2, vpp=2, sp=True)),
    Case(Layout(tp=2, dp=2)),
    Case(Layout(tp=2, dp=2, sp=True, distributed_optimizer=True), micro_batch="dynamic"),
    Case(Layout(tp=2, cp=2, sp=True)),
    Case(Layout(tp=2, cp=2, packed=False), model="odd-vocabulary"),
    Case(Layout(pp=2, dp=2)),
    Case(Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True), model="tied"),
    Case(Layout(pp=2, cp=2)),
    Case(Layout(dp=2, cp=2), reverse=True),
    Case(Layout(dp=2, cp=2, distributed_optimizer=True, packed=False)),
    Case(Layout(), fused=True),
    Case(Layout(), micro_batch="dynamic", pad=64, fused=True),
    Case(Layout(), temperature=0.7, reverse=True, fused=True),
    Case(Layout(), model="tied", fused=True),
    Case(Layout(), model="odd-vocabulary", fused=True),
    Case(Layout(tp=2, sp=True), micro_batch=1, fused=True),
    Case(Layout(tp=2, sp=True), model="odd-vocabulary", temperature=0.7, fused=True),
    Case(Layout(pp=2), model="tied", fused=True),
    Case(Layout(pp=2, vpp=2), fused=True),
    Case(Layout(dp=2, distributed_optimizer=True), fused=True),
    Case(Layout(cp=2), micro_batch=1, fused=True),
    Case(Layout(tp=4, sp=True), model="tied", fused=True),
    Case(Layout(tp=2, pp=2, vpp=2, sp=True), fused=True),
    Case(Layout(tp=2, cp=2, sp=True), micro_batch="dynamic", fused=True),
    Case(Layout(dp=2, cp=2), reverse=True, fused=True),
    Case(Layout(), model="experts"),
    Case(Layout(packed=False), model="experts", temperature=0.7),
    Case(Layout(dp=2, ep=2), model="experts", micro_batch="dynamic"),
    Case(Layout(dp=2, ep=2, distributed_optimizer=True), model="experts"),
    Case(Layout(tp=2, sp=True, ep=2, etp=1), model="experts", fused=True),
    Case(Layout(pp=2), model="experts"),
    Case(Layout(cp=2, ep=2), model="experts"),
    Case(Layout(tp=2, dp=2, sp=True, ep=2), model="experts"),
    Case(
        Layout(tp=2, dp=2, sp=True, ep=2, etp=1, distributed_optimizer=True, packed=False),
        model="experts",
    ),
    Case(Layout(), model="experts", replay=True),
    Case(Layout(dp=2, ep=2), model="experts", micro_batch="dynamic", replay=True),
    Case(Layout(tp=2, sp=True, ep=2, etp=1), model="experts", replay=True),
]
COLUMNS = (
    "layout", "ranks", "accepted / tokens", "m_H", "m_F", "loss", "gradients", "weights"
)  # fmt: skip
TABLE = DocumentedTable(
    Path(__file__).parents[3] / "docs/parallelism.md", "matrix", COLUMNS, [str(c) for c in CASES]
)


@dataclass
class Deviation:
    """Largest deviations from the float64 reference over all steps, tokens, tensors and ranks."""

    objective_shift: float
    """Of a token, as a share of its value or of the step's median, whichever is larger."""
    policy_shift: float
    """Likewise."""
    loss: float
    """As a share of the step's largest advantage."""
    gradient: float
    """Of an element, as a share of the tensor's largest."""
    weight: float
    """After two optimizer steps, absolute."""


TOLERANCE = Deviation(
    objective_shift=5e-6, policy_shift=1e-5, loss=2e-6, gradient=3e-5, weight=2e-6
)
"""Float32 against float64, five to ten times what was measured."""


@pytest.fixture(scope="module")
def recording_of(models):
    return once_per_model(record, models)


@pytest.fixture(scope="module")
def replays_of(request, models, recording_of):
    return launch_by_size(
        request, replay, lambda case: (case, recording_of(case).batch, models[case.model])
    )


@pytest.fixture(scope="module")
def matrix():
    """Collects what was measured, for the documentation."""
    with TABLE.measured() as rows:
        yield rows


def runnable(case: Case) -> Any:
    """The case, to be skipped if the bridge of this run cannot load it."""
    split = case.layout.vpp > 1 and case.model == "tied"
    if settings_of()["vanilla_mbridge"] or not split:
        return case
    reason = "Megatron-Bridge 0.5 cannot load tied embeddings into virtual stages"
    return pytest.param(case, marks=pytest.mark.skip(reason=reason))


@pytest.mark.parametrize("case", [runnable(case) for case in CASES], ids=str)
def test_layout(case: Case, replays_of, recording_of, matrix) -> None:
    recording, ranks = recording_of(case), replays_of(case)
    check_recording(recording)
    deviation = Deviation(0.0, 0.0, 0.0, 0.0, 0.0)
    accepted = tokens = 0
    for at, step in enumerate(recording.steps):
        seen = [rank.steps[at] for rank in ranks]
        reports = [s.metrics for s in seen if s.metrics is not None]
        assert len(reports) == case.layout.dp
        index = {np.float32(advantage): i for i, advantage in enumerate(step.advantages)}
        times_seen = np.zeros(len(index), dtype=int)
        for rank in seen:
            mine = np.array([index[advantage] for advantage in rank.advantages.numpy()], dtype=int)
            times_seen[mine] += 1
            if not len(mine):
                continue
            # An advantage names its token: what is packed beside it has to be that token's.
            assert np.array_equal(rank.actions.numpy(), step.actions[mine])
            np.testing.assert_allclose(
                rank.hidden_states.numpy(), step.hidden_states[mine], rtol=0, atol=1e-4
            )
            assert np.array_equal(rank.accepted.numpy(), step.accepted[mine])
            for name in ("objective_shift", "policy_shift"):
                want = getattr(step, name)
                scale = np.maximum(np.abs(want), np.median(np.abs(want)))[mine]
                worst = np.max(np.abs(getattr(rank, name).numpy() - want[mine]) / scale)
                setattr(deviation, name, max(getattr(deviation, name), float(worst)))
        # Each token is on every tensor-parallel rank of one last pipeline stage, and nowhere else.
        assert (times_seen == case.layout.tp).all()
        check_metrics(reports, step)
        loss = sum(report["loss"] for report in reports) / case.layout.dp
        deviation.loss = max(
            deviation.loss, abs(loss - step.loss) / float(np.abs(step.advantages).max())
        )
        for gradients in (s.gradients for s in seen if s.gradients is not None):
            deviation.gradient = max(
                deviation.gradient, largest(gradients, step.gradients, relative=True)
            )
        accepted, tokens = accepted + int(step.accepted.sum()), tokens + len(step.accepted)
    for weights in (rank.weights for rank in ranks if rank.weights is not None):
        deviation.weight = max(
            deviation.weight, largest(weights, recording.weights, relative=False)
        )
    for field in fields(Deviation):
        assert getattr(deviation, field.name) <= getattr(TOLERANCE, field.name), field.name
    matrix[str(case)] = [
        str(case.layout.world_size),
        f"{accepted} / {tokens}",
        *(f"{x:.0e}" for x in astuple(deviation)),
    ]


def check_recording(recording: Recording) -> None:
    """The recording decides something: both tests reject tokens in every step, and no decision
    hangs on rounding.
    """
    assert recording.margin > 1e-3
    for step in recording.steps:
        assert 0 < step.accepted.sum() < len(step.accepted) == recording.batch.tokens


def check_metrics(reports: list[dict], step) -> None:
    for report in reports:
        assert report["capo/accepted_tokens"] == [step.accepted.sum()]
        assert report["capo/rejection_rate"] == [pytest.approx(1 - step.accepted.mean(), rel=1e-6)]
        assert report["capo/policy_shift_mean"] == [
            pytest.approx(step.policy_shift.mean(), rel=1e-5)
        ]
        assert float(report["grad_norm"]) == pytest.approx(step.grad_norm, rel=1e-5)
        for when, (objective, policy) in zip(("before", "after"), step.batch_shifts, strict=True):
            assert report[f"capo/batch_objective_shift_{when}"] == [
                pytest.approx(objective, rel=1e-4)
            ]
            assert report[f"capo/batch_policy_shift_{when}"] == [pytest.approx(policy, rel=1e-4)]


def largest(got: dict, want: dict[str, np.ndarray], relative: bool) -> float:
    assert got.keys() == want.keys()
    return max(
        float(np.abs(got[name].numpy() - x).max() / (np.abs(x).max() if relative else 1.0))
        for name, x in want.items()
    )


def test_a_replay_of_routes_is_seen(recording_of) -> None:
    """After the first step the router would send tokens elsewhere."""
    ways = [recording_of(Case(Layout(), model="experts", replay=on)) for on in (False, True)]
    first, second = (
        np.abs(free.hidden_states - replayed.hidden_states).max()
        for free, replayed in zip(*(way.steps for way in ways), strict=True)
    )
    assert first == 0.0 and second > 0.1


def test_documented_matrix_is_of_these_layouts() -> None:
    """The committed table lists the cases above, none of them beyond the tolerance."""
    committed = TABLE.committed()
    for case in CASES:
        ranks, _, *deviations = committed[str(case)]
        assert int(ranks) == case.layout.world_size
        assert all(
            float(cell) <= limit for cell, limit in zip(deviations, astuple(TOLERANCE), strict=True)
        ), case
