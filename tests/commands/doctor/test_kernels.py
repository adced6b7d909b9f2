# SPDX-License-Identifier: Apache-2.0
"""The kernels' check: their comparison with plain torch, on a GPU where there is one, else in
Triton's interpreter.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from capo_verl.commands.doctor import kernels
from capo_verl.commands.doctor.check import Broken

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_fused_and_plain_kernels_agree():
    pytest.importorskip("triton")
    from capo_verl.commands.doctor import deviations

    found = deviations.deviations(DEVICE)
    assert len(found) == 11 and found["best_keys"] == 0
    assert max(found.values()) < 1e-5 < deviations.TOLERANCE
    assert (
        sum(deviation > 0 for deviation in found.values()) >= 3
    )  # two ways of adding up, not one compared with itself


def test_kernels_that_do_nothing_and_other_ids_are_seen(monkeypatch):
    pytest.importorskip("triton")
    from capo_verl.commands.doctor import deviations
    from capo_verl.core.kernels import fused, plain

    for name in ("move", "update", "add_row_sums"):
        monkeypatch.setattr(fused, name, lambda *_: None)
    found = deviations.deviations(DEVICE)
    wrong = {what for what, deviation in found.items() if deviation > deviations.TOLERANCE}
    assert wrong == {
        "move exp_avg",
        "move exp_avg_sq",
        "update exp_avg",
        "update exp_avg_sq",
        "add_row_sums",
    }
    monkeypatch.setattr(
        fused, "best_keys", lambda logits, k, shard: plain.best_keys(logits, k + 1, shard)[:, 1:]
    )
    assert deviations.deviations(DEVICE)["best_keys"] == float("inf")


@pytest.fixture
def machine(monkeypatch):
    """Pretends that triton and a GPU are there, or not, and that kernels deviate."""

    def choose(triton, gpu, **deviations):
        find_spec = importlib.util.find_spec
        there = lambda name, *rest: (triton or None) if name == "triton" else find_spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", there)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        if deviations:
            monkeypatch.setattr(
                "capo_verl.commands.doctor.deviations.deviations", lambda device: deviations
            )

    return choose


def test_what_a_machine_allows(machine):
    machine(triton=False, gpu=False)
    outcome = kernels.examine()
    assert outcome.status == "skipped" and outcome.message.startswith("no GPU and no triton here: ")
    machine(triton=False, gpu=True)
    assert kernels.examine().message == (
        "triton is missing, so the GPU runs the kernels' plain torch twins: pip install triton"
    )
    assert kernels.examine().status == "warn"


def test_on_a_gpu_they_are_compared(machine):
    machine(triton=True, gpu=True, move=3e-7, update=0.0)
    outcome = kernels.examine()
    assert (outcome.status, outcome.message) == (
        "ok", "the kernels ran on H100 and equal plain torch (largest of 2 deviations: 3e-07)",
    )  # fmt: skip
    machine(triton=True, gpu=True, move=float("nan"), best_keys=float("inf"), update=1e-7)
    outcome = kernels.examine()
    assert (outcome.status, outcome.message) == (
        "FAIL",
        "on H100 kernels differ from plain torch (move by nan, best_keys by inf): install the "
        "triton that belongs to this torch",
    )


def test_a_crash_is_a_failure_of_this_check():
    class Crashed:
        def answer(self, timeout):
            raise Broken("Segmentation fault (exit code -11)")

    with pytest.raises(Broken) as refused:
        kernels.judge(Crashed())
    assert str(refused.value) == (
        "the kernels fail: Segmentation fault (exit code -11); install the triton that belongs to "
        "this torch (scripts/check_stack.py)"
    )
