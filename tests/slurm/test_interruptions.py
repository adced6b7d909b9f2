# SPDX-License-Identifier: Apache-2.0
"""A run over two nodes that is interrupted in every way ends up where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.slurm.conftest import Job

EXACT = (
    "response_length/",
    "prompt_length/",
    "actor/lr",
    "capo/rejection_rate",
    "capo/accepted_tokens",
    "training/epoch",
)
"""Metrics of what was sampled and decided: the same tokens, the same learning rate, the same
accepted tokens.
"""
CLOSE = ("critic/rewards/", "critic/score/", "actor/pg_loss", "actor/grad_norm", "actor/entropy",
    "capo/policy_shift",
         "capo/objective_shift")  # fmt: skip
"""Sums over the rows of a batch, which verl takes in the order in which they were finished."""
MOMENTS = "actor/capo/dist_ckpt/.metadata"


def metrics_by_step(folder: Path) -> dict[int, dict[str, float]]:
    """What all attempts logged; of a step that was trained twice, the later one."""
    attempts = sorted(folder.glob("metrics*.jsonl"), key=lambda path: (len(path.name), path.name))
    lines = [json.loads(line) for path in attempts for line in path.read_text().splitlines()]
    return {line["step"]: line["data"] for line in lines}


def raylet_of(job: Job, attempt: int, node: int) -> int:
    """Process id of the raylet of a node of a running job."""
    marker = f"ray{job.number}.{attempt}.{node}/".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].endswith(b"/raylet") and any(marker in word for word in words):
            found.append(int(process.name))
    assert len(found) == 1, found
    return found[0]


def test_usr1_requeue_and_a_killed_raylet_change_nothing(submit, cluster):
    whole = submit(name="whole")
    assert whole.wait() == "COMPLETED", whole.printed
    assert (
        "all 2 nodes have joined" in whole.printed
        and "finished: all 8 steps are done" in whole.printed
    )
    assert whole.left_behind() == []
    expected = metrics_by_step(whole.output)
    assert list(expected) == list(range(1, 9))

    job = submit(name="interrupted")
    latest = job.checkpoints / "latest_checkpointed_iteration.txt"

    def trained(steps: int) -> bool:
        return len(metrics_by_step(job.output)) >= steps

    def resumed(attempt: int) -> bool:
        return job.logs(attempt).exists() and int(job.state["Restarts"]) == attempt

    # Slurm warns: the step is finished, a checkpoint written where none is due (SAVE_FREQ=3), the
    # job queues again.
    job.wait_until(lambda: trained(1), 200)
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_until(lambda: resumed(1), 100)
    stopped = int(latest.read_text())
    assert stopped in (2, 3), job.printed
    assert (job.checkpoints / f"global_step_{stopped}" / MOMENTS).exists()
    assert f"requeue: stopped as requested, step {stopped} of 8 done" in job.printed
    assert not (job.checkpoints / "stop").exists()

    # Somebody requeues it, which kills it at once: it resumes from the newest checkpoint.
    job.wait_until(lambda: trained(stopped + 2), 200)
    cluster.call("scontrol", "requeue", str(job.number))
    job.wait_until(lambda: resumed(2), 100)
    saved = int(latest.read_text())
    assert saved % 3 == 0 or saved == stopped

    # Ray dies on the second node: a clear failure, then again from the newest checkpoint.
    job.wait_until(
        lambda: (
            (job.logs(2) / "driver.log").exists()
            and "step:" in (job.logs(2) / "driver.log").read_text()
        ),
        200,
    )
    os.kill(raylet_of(job, attempt=2, node=1), signal.SIGKILL)
    job.wait_until(lambda: resumed(3), 150)
    assert "ERROR: Ray on node n2 ended" in job.printed and "exit code(s)=-9" in job.printed
    assert "requeue: failed at step" in job.printed

    assert job.wait() == "COMPLETED", job.printed
    assert "finished: all 8 steps are done" in job.printed
    assert job.left_behind() == []
    for attempt in (1, 2, 3):
        log = (job.logs(attempt) / "driver.log").read_text(errors="replace")
        assert "Resuming from" in log and "moments start empty" not in log
    names = {"driver.log", "health.log", "outcome.log", "preflight.log", "ray-n1.log", "ray-n2.log"}
    assert {path.name for path in job.logs(0).iterdir()} == names

    found = metrics_by_step(job.output)
    assert sorted(found) == list(range(1, 9))
    compared = 0
    for step, values in expected.items():
        for name, value in values.items():
            if name.startswith(EXACT):
                assert found[step][name] == value, (step, name)
                compared += 1
            elif name.startswith(CLOSE):
                assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
                compared += 1
    assert compared >= 8 * 20
    # A schedule that starts anew would show, and so would a filter that has forgotten its moments.
    assert len({values["actor/lr"] for values in expected.values()}) > 1
    assert 0 < max(values["capo/rejection_rate"] for values in expected.values()) < 1


def test_usr1_with_an_asynchronous_trainer(submit, cluster):
    """The rollouts that wait are saved with the step, and the next attempt goes on from both."""
    job = submit(
        name="asynchronous", TRAINER_MODE="colocate_async", TOTAL_TRAINING_STEPS=4, SAVE_FREQ=4
    )
    job.wait_until(lambda: len(metrics_by_step(job.output)) >= 1, 200)
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_until(lambda: int(job.state["Restarts"]) == 1, 100)
    stopped = int((job.checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert f"requeue: stopped as requested, step {stopped} of 4 done" in job.printed
    saved = job.checkpoints / f"global_step_{stopped}"
    assert (saved / MOMENTS).exists() and (saved / "transfer_queue").exists()
    assert job.wait() == "COMPLETED", job.printed
    assert "finished: all 4 steps are done" in job.printed and job.left_behind() == []
    log = (job.logs(1) / "driver.log").read_text(errors="replace")
    assert "Resuming from" in log and "moments start empty" not in log
    steps = metrics_by_step(job.output)
    assert sorted(steps) == [1, 2, 3, 4] and stopped in (1, 2, 3)
    for metrics in steps.values():
        if metrics["training/off_policy/trajectory_staleness/max"] == 0:
            assert metrics["training/rollout_probs_diff_max"] < 1e-5
