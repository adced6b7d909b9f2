# SPDX-License-Identifier: Apache-2.0
"""Ray over the nodes of a job: the health gate, failures that repeat, arrays, chains, environments.
What is trained is no matter here, so most run scripts are a few lines of bash.
"""

from __future__ import annotations

import json
from pathlib import Path

TWO_NODES = ("--nodes=2", "--time=30")
ONE_NODE = ("--nodes=1", "--time=30")

ASK = """
if [[ ${DRY_RUN:-0} != 0 ]]; then exit 0; fi
"""


def script(folder: Path, body: str) -> Path:
    """A run script as the job calls it, also for its dry run."""
    path = folder / "run_test.sh"
    path.write_text("#!/usr/bin/env bash\nset -euo pipefail\n" + ASK + body)
    return path


def test_a_missing_node_is_named_and_a_second_failure_at_the_same_step_ends_the_job(
    submit, tmp_path
):
    """Ray hangs on the second node, as with a full disk or a dead mount."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ray").write_text(
        '#!/usr/bin/env bash\nif [[ $SLURMD_NODENAME == n2 ]]; then echo "waiting for the file '
        'system"; exec sleep 600; fi\n'
        'PATH=${PATH#*:} exec ray "$@"\n'
    )
    (programs / "ray").chmod(0o755)
    setup = tmp_path / "setup.sh"
    # The virtual environment is put in front of PATH later, so it has to be this one's.
    setup.write_text(f"export PATH=$VENV/bin:$PATH\nexport PATH={programs}:$PATH\nunset VENV\n")
    job = submit(
        options=TWO_NODES,
        script=script(tmp_path, "echo never\n"),
        name="missing",
        SETUP=setup,
        JOIN_SECONDS=8,
    )
    assert job.wait(180) == "FAILED"
    assert job.state["Restarts"] == "1"
    printed = job.printed
    assert printed.count("after 8 s: node n2 has not joined Ray") == 2, printed
    assert "waiting for the file system" in printed
    assert (
        "requeue: failed before its first step with exit code 3, for the first time there"
        in printed
    )
    assert "give up: failed twice before its first step: not requeued" in printed
    assert "never" not in printed and not (job.logs(0) / "driver.log").exists()
    assert job.left_behind() == []
    attempts = [
        json.loads(line) for line in (job.output / "attempts.jsonl").read_text().splitlines()
    ]
    assert [(a["name"], a["trained"], a["exit_code"]) for a in attempts] == [
        (f"{job.number}.0", False, 3), (f"{job.number}.1", False, 3)]  # fmt: skip


def test_nodes_that_lack_their_gpus_are_named(submit, tmp_path):
    """Slurm allots what Ray does not find: here the GPUs are look-alikes."""
    job = submit(
        options=ONE_NODE,
        script=script(tmp_path, ""),
        name="gpus",
        VERL_PLATFORM=None,
        JOIN_SECONDS=2,
        REQUEUE=0,
    )
    assert job.wait(120) == "FAILED"
    assert job.state["ExitCode"] == "3:0"
    assert "after 2 s: node n1 joined with 0 GPUs, 1 expected" in job.printed


def test_the_drivers_exit_code_is_the_jobs(submit, tmp_path):
    job = submit(
        options=ONE_NODE,
        script=script(tmp_path, "echo trained >&2; exit 7\n"),
        name="exit_code",
        REQUEUE=0,
    )
    assert job.wait(120) == "FAILED"
    assert job.state["ExitCode"] == "7:0"
    assert "n1 joined with 1 GPUs" in (job.logs(0) / "health.log").read_text()
    assert "trained" in (job.logs(0) / "driver.log").read_text()
    assert (
        "training ended with exit code 7; last lines of" in job.printed
        and "    trained" in job.printed
    )


def test_array_of_seeds_with_a_cluster_each(submit, tmp_path):
    """Two tasks at once, on a node each: own seeds, outputs, ports and tokens."""
    report = (
        "env | grep -E '^(SEED|OUTPUT_DIR|RAY_ADDRESS|RAY_AUTH_TOKEN|NNODES|NGPUS_PER_NODE)=' "
        ">$OUTPUT_DIR/seen\n"
    )
    ask_ray = (
        "python3 -c 'import ray; ray.init(log_to_driver=False); print(len(ray.nodes()))' "
        ">$OUTPUT_DIR/nodes\n"
    )
    job = submit(
        options=(*ONE_NODE, "--array=3-4"), script=script(tmp_path, report + ask_ray), name="array"
    )
    tasks = {}
    for seed in (3, 4):
        done = job.output / str(seed) / "nodes"
        job.wait_until(
            lambda done=done: done.exists() and done.read_text().strip() == "1",
            120,
            ended_is_fine=True,
        )
        lines = (job.output / str(seed) / "seen").read_text().splitlines()
        tasks[seed] = dict(line.split("=", 1) for line in lines)
        assert (
            tasks[seed]["SEED"] == str(seed)
            and tasks[seed]["NNODES"] == tasks[seed]["NGPUS_PER_NODE"] == "1"
        )
    assert tasks[3]["RAY_ADDRESS"] != tasks[4]["RAY_ADDRESS"]
    assert (
        len(tasks[3]["RAY_AUTH_TOKEN"]) == 64
        and tasks[3]["RAY_AUTH_TOKEN"] != tasks[4]["RAY_AUTH_TOKEN"]
    )


STEPS = """
checkpoints=$OUTPUT_DIR/checkpoints
progress=$checkpoints/progress.json
from=$(sed -n 's/.*"step": \\([0-9]*\\).*/\\1/p' "$progress" 2>/dev/null || true)
from=${from:-0}
echo "from $from" >>"$OUTPUT_DIR/starts"
for ((step = from + 1; step <= 5; step++)); do
    stopped=false
    while [[ $from == 0 && $step == 2 && ! -e $checkpoints/stop ]]; do sleep 0.2; done
    if [[ -e $checkpoints/stop ]]; then stopped=true; rm "$checkpoints/stop"; fi
    written='{"step": %d, "total_steps": 5, "checkpoint": %d, "step_seconds": 1, "stopped": %s}'
    printf "$written\\n" $step $step $stopped >"$progress"
    echo $step >"$checkpoints/latest_checkpointed_iteration.txt"
    if $stopped; then exit 0; fi
done
"""
"""A run of five steps which, the first time, waits in its second until it is asked to stop."""


def test_preempted_by_a_job_of_higher_priority(submit, cluster, tmp_path):
    job = submit(options=TWO_NODES, script=script(tmp_path, STEPS), name="preempted")
    starts = job.output / "starts"
    job.wait_until(starts.exists, 60)
    urgent = cluster.call(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--gres=gpu:1",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )
    job.wait_until(lambda: job.state["Restarts"] == "1", 60)
    job.wait_until(lambda: cluster.state(int(urgent))["JobState"] == "COMPLETED", 60)
    assert (
        "warned by Slurm (USR1)" in job.printed
        and "requeue: stopped as requested, step 2 of 5 done" in job.printed
    )
    assert job.wait(90) == "COMPLETED"
    assert starts.read_text().splitlines() == ["from 0", "from 2"]
    assert job.left_behind() == []


def test_chain_continues_a_stopped_job_and_is_dropped_after_a_complete_one(submit, tmp_path):
    """Three jobs of one run: the first is warned, the second completes it, the third is not
    needed.
    """
    job = submit(options=(*ONE_NODE, "--chain=3"), script=script(tmp_path, STEPS), name="chain")
    starts = job.output / "starts"
    job.wait_until(starts.exists, 60)
    job.cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    assert (
        job.wait(60) == "FAILED"
        and job.state["ExitCode"] == "75:0"
        and job.state["Restarts"] == "0"
    )
    assert (
        "stopped as requested, step 2 of 5 done" in job.printed
        and "REQUEUE=0: submit again" in job.printed
    )
    second, third = (type(job)(job.cluster, job.number + i, job.output, job.log) for i in (1, 2))
    assert second.wait(90) == "COMPLETED"
    assert starts.read_text().splitlines() == ["from 0", "from 2"]
    assert third.wait(60) == "CANCELLED"


def test_container_commands(submit, tmp_path):
    """Every part runs inside the image: Ray, the health gate, the run script.

    The runtime here only notes what it is asked.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    (programs / "apptainer").write_text(
        f'#!/usr/bin/env bash\necho "$*" >>{calls}\nwhile [[ $1 != *.sif ]]; do shift; '
        'done\nshift\nexec "$@"\n'
    )
    (programs / "apptainer").chmod(0o755)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={programs}:$VENV/bin:$PATH\nunset VENV\n")
    job = submit(
        options=ONE_NODE, script=script(tmp_path, "echo trained\n"), name="container", SETUP=setup,
        CONTAINER_IMAGE="/images/verl.sif", CONTAINER_RUNTIME="apptainer",
        CONTAINER_MOUNTS="/datasets:/data",
    )  # fmt: skip
    assert job.wait(90) == "COMPLETED", job.printed
    lines = calls.read_text().splitlines()
    assert all(line.startswith("exec --nv --bind ") and "/datasets:/data" in line for line in lines)
    for part in (
        "ray_node.sh head n1",
        "capo_verl.launch.ray_cluster",
        "run_test.sh",
        "DRY_RUN=strict",
        "capo_verl.launch.outcome",
    ):
        assert any(part in line for line in lines), part
