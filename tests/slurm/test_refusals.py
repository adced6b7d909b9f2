# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused in one line, before any Ray process starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_NODE = ("--nodes=1", "--time=30")

CASES = {
    "model path": ({"MODEL_PATH": "/nowhere/model"}, (), "/nowhere/model"),
    "data path": ({"DATA_DIR": "/nowhere/data"}, (), "/nowhere/data/train.parquet"),
    "output directory": ({"OUTPUT_DIR": "/dev/null/run"}, (), "OUTPUT_DIR=/dev/null/run cannot be written to"),
    "heads": ({"ACTOR_TP": 3}, (), "4 "),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_ray_starts(case, submit):
    environment, overrides, named = CASES[case]
    job = submit(*overrides, options=ONE_NODE, name="refused", **environment)
    assert job.wait(60) == "FAILED"
    assert job.state["ExitCode"] == "2:0"
    assert job.state["Restarts"] == "0"  # it would be refused again
    errors = [line for line in job.printed.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and named in errors[0], job.printed
    assert "Ray at" not in job.printed
    assert job.left_behind() == []


def test_time_limit_below_one_step(submit):
    job = submit(options=("--nodes=1", "--time=1"), name="short", STEP_SECONDS=59, JOIN_SECONDS=1)
    job.cluster.call("scancel", str(job.number))
    job = submit(options=ONE_NODE, name="refused", STEP_SECONDS=1740, JOIN_SECONDS=1, MODEL_PATH="/nowhere")
    assert job.wait(60) == "FAILED" and "/nowhere" in job.printed  # long enough: refused for another reason


def run_submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/slurm/submit.sh"), *arguments], capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip
