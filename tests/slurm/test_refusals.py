# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused in one line, before any Ray process starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.slurm.conftest import Job
from tests.slurm.two_nodes import TwoNodes

ROOT = Path(__file__).parents[2]
ONE_NODE = ("--nodes=1", "--time=30")
TRAIN, SCRIPT = "examples/slurm/train.sbatch", "examples/run_quickstart_cpu.sh"

CASES = {
    "model path": ({"MODEL_PATH": "/nowhere/model"}, "model.path=/nowhere/model does not exist"),
    "data path": (
        {"DATA_DIR": "/nowhere/data"},
        "data.train_files=/nowhere/data/train.parquet does not exist",
    ),
    "heads": ({"ACTOR_TP": 3, "NGPUS_PER_NODE": 3}, "tensor_model_parallel_size=3"),
}


def refused(job: Job) -> str:
    """The one line in which a job was refused, at once and for good."""
    assert job.wait(60) == "FAILED"
    assert job.state["ExitCode"] == "2:0" and job.state["Restarts"] == "0"
    errors = [line for line in job.printed.splitlines() if "ERROR" in line]
    assert len(errors) == 1, job.printed
    assert "Ray at" not in job.printed and job.left_behind() == []
    return errors[0]


@pytest.mark.parametrize("case", CASES)
def test_refused_before_ray_starts(case, submit):
    environment, named = CASES[case]
    job = submit(options=ONE_NODE, name="refused", **{"NGPUS_PER_NODE": 2, **environment})
    assert named in refused(job)


def test_output_directory_that_cannot_be_written_to(submit, cluster, tmp_path):
    message = "OUTPUT_DIR=/dev/null/run cannot be written to: set it to a folder of yours"
    with pytest.raises(RuntimeError, match=f"submit.sh: {message}"):
        submit(options=ONE_NODE, OUTPUT_DIR="/dev/null/run")
    assert message in refused(by_hand(cluster, tmp_path, OUTPUT_DIR="/dev/null/run"))


def test_temporary_folder_that_is_missing(submit):
    job = submit(options=ONE_NODE, name="tmp", RAY_TMP_ROOT="/nowhere")
    assert "RAY_TMP_ROOT=/nowhere is no folder that can be written to" in refused(job)


def test_time_limit_below_one_step(cluster, tmp_path):
    job = by_hand(cluster, tmp_path, STEP_SECONDS="120")
    assert re.search(
        r"the time limit leaves \d+ s, but one step takes up to STEP_SECONDS=120: raise --time",
        refused(job),
    )


def test_too_few_cpus_for_verl(submit):
    job = submit(options=ONE_NODE, name="cpus", RAY_CPUS_PER_NODE=4)
    assert (
        "4 CPUs per node, but verl reserves three for each GPU: ask for --cpus-per-task=5"
        in refused(job)
    )


def test_a_run_that_would_begin_anew_after_every_requeue(submit):
    assert "RESUME_MODE=disable would begin anew" in refused(
        submit(options=ONE_NODE, name="anew", RESUME_MODE="disable")
    )


def by_hand(cluster: TwoNodes, folder: Path, **environment: str) -> Job:
    """The template given to sbatch directly, for a minute."""
    log, output = folder / "by_hand.out", folder / "by_hand"
    number = cluster.call(
        "sbatch", "--parsable", "--nodes=1", "--gres=gpu:1", "--time=1", f"--chdir={ROOT}",
        f"--output={log}", str(ROOT / TRAIN), SCRIPT,
        environment={"RAY_CPUS_PER_NODE": "12", "OUTPUT_DIR": str(output),
            "CAPO_VERL_ROOT": str(ROOT), **environment},
    )  # fmt: skip
    return Job(cluster, int(number), output, log)
