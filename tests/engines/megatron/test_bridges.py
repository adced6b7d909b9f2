# SPDX-License-Identifier: Apache-2.0
"""Megatron-Bridge and mbridge are the same to CAPO: every number of three steps, and checkpoints in
both directions.
"""

from __future__ import annotations

import pytest
import torch

from capo_verl.plugin.bridge import lacking
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.bridge_cases import BridgeCase, resume_through_both, steps_of_both
from tests.engines.megatron.replay_cases import COLUMNS
from tests.helpers.bridge import BRIDGES
from tests.helpers.grouped import launch_by_size
from tests.helpers.recording import RecordedBatch
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

pytestmark = pytest.mark.skipif(
    bool(lacking()),
    reason="Megatron-Bridge needs Python 3.12 and Megatron-Core 0.17: scripts/test_gpu_stack.sh",
)

CASES = [
    *(
        BridgeCase(layout, model, dtype)
        for dtype in ("float32", "bfloat16")
        for layout, model in (
            (Layout(), "untied"),
            (Layout(tp=2, sp=True), "tied"),
            (Layout(pp=2), "tied"),
            (Layout(pp=2, vpp=2), "untied"),
            (Layout(dp=2, distributed_optimizer=True), "untied"),
            (Layout(cp=2), "untied"),
        )
    ),
    BridgeCase(Layout(), "tied"),
    BridgeCase(Layout(packed=False)),
    BridgeCase(Layout(tp=2), "odd-vocabulary"),
    BridgeCase(Layout(tp=2, sp=True), "untied", fused=True),
    BridgeCase(Layout(pp=2), "untied"),
    BridgeCase(Layout(dp=2, distributed_optimizer=True), "tied"),
    BridgeCase(Layout(cp=2), "tied"),
    BridgeCase(Layout(tp=2), "llama"),
    BridgeCase(Layout(tp=2), "qwen3"),
]


@pytest.fixture(scope="module")
def steps(request, models):
    batch = RecordedBatch.make()
    return launch_by_size(
        request, steps_of_both, lambda case: (case, batch, models[case.model]), timeout=1800
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_are_bit_identical(case: BridgeCase, steps) -> None:
    ranks = steps(case)
    accepted = [step.accepted for mbridge, _ in ranks for step in mbridge.steps]
    assert 0 < sum(int(x.sum()) for x in accepted) < sum(len(x) for x in accepted)
    for mbridge, megatron_bridge in ranks:
        assert len(mbridge.steps) == len(megatron_bridge.steps) == 3
        for a, b in zip(mbridge.steps, megatron_bridge.steps, strict=True):
            for name in COLUMNS:
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert numbers(a.metrics) == numbers(b.metrics)
            check_equal(a.gradients, b.gradients)
        check_equal(mbridge.weights, megatron_bridge.weights)


def numbers(metrics: dict | None) -> dict | None:
    """Loss, gradient norm and all of CAPO's, but for times."""
    return metrics and {
        name: value
        for name, value in metrics.items()
        if name in ("loss", "grad_norm") or (name.startswith("capo/") and "seconds" not in name)
    }


def check_equal(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor] | None) -> None:
    """All tensors under the same names, to the last bit."""
    assert (a is None) == (b is None)
    if a is not None:
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    "case",
    [
        BridgeCase(Layout(tp=2, sp=True)),
        BridgeCase(Layout(pp=2), "tied"),
        BridgeCase(Layout(dp=2, distributed_optimizer=True), dtype="bfloat16"),
    ],
    ids=str,
)
def test_either_bridge_goes_on_from_a_checkpoint_of_the_other(case, models, tmp_path) -> None:
    ranks = run_on_ranks(
        resume_through_both,
        case.layout.world_size,
        case,
        models[case.model],
        str(tmp_path),
        preload=ENGINE_MODULES,
        timeout=600,
    )
    for results in ranks:
        (moments, weights), *others = [x for bridge in BRIDGES for x in results[bridge]]
        assert len(others) == 5
        for other_moments, other_weights in others:
            check_equal(weights, other_weights)
            assert (moments is None) == (other_moments is None)
            if moments is not None:
                assert moments["step"] == other_moments["step"] == 3
                for name in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(moments[name], other_moments[name])
