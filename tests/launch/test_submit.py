# SPDX-License-Identifier: Apache-2.0
"""What ``scripts/slurm/submit.sh`` refuses before it talks to Slurm, and what it hands over; sbatch
is a recorder here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/run_quickstart_cpu.sh"


@pytest.fixture
def submit(tmp_path):
    recorder = tmp_path / "sbatch"
    recorder.write_text(
        '#!/usr/bin/env bash\necho "CHAIN_LINK=$CHAIN_LINK REQUEUE=${REQUEUE:-} $*" '
        f">>{tmp_path}/calls\n"
        f"wc -l <{tmp_path}/calls\n"
    )
    recorder.chmod(0o755)

    def call(*arguments: str, **environment: str | int) -> tuple[int, str, list[str]]:
        done = subprocess.run(
            ["bash", str(ROOT / "scripts/slurm/submit.sh"), "--no-check", *arguments],
            capture_output=True, text=True,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "OUTPUT_DIR": str(tmp_path / "out"),
                 **{key: str(value) for key, value in environment.items()}},
        )  # fmt: skip
        calls = tmp_path / "calls"
        return (
            done.returncode,
            done.stderr.strip(),
            calls.read_text().splitlines() if calls.exists() else [],
        )

    return call


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("35", 2100),
        ("34:59", 2099),
        ("0:35:00", 2100),
        ("0-1", 3600),
        ("0-0:34", 2040),
        ("0-00:34:59", 2099),
        ("08-00:00:00", 691200),
    ],
)
def test_a_time_limit_has_to_hold_a_step(submit, limit, seconds):
    code, error, calls = submit(
        f"--time={limit}", "--", SCRIPT, STEP_SECONDS=1800, JOIN_SECONDS=300
    )
    if seconds >= 2100:
        assert code == 0 and len(calls) == 1
    else:
        assert code == 2 and not calls
        assert error == (
            f"submit.sh: --time={limit} is {seconds} s, less than one step (STEP_SECONDS=1800) and "
            "starting up (JOIN_SECONDS=300): raise it"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--time=soon", "--", SCRIPT), "--time=soon: write it as minutes, H:MM:SS or D-HH:MM:SS"),
        (("--time=1-0",), "which run script?"),
        (("--", "examples/none.sh"), "there is no run script examples/none.sh"),
        (("--chain=2", "--array=1-3", "--", SCRIPT), "--chain and --array together"),
        (("--chain=0", "--", SCRIPT), "--chain=0: set it to the number of jobs"),
        (("--signal=B:USR1@5", "--", SCRIPT), "--signal is set here"),
    ],
)
def test_refused(submit, arguments, message):
    code, error, calls = submit(*arguments)
    assert code == 2 and not calls
    assert error.splitlines()[-1].startswith("submit.sh: ") and message in error.splitlines()[-1]


def test_a_step_that_was_measured_to_be_longer_is_believed(submit, tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    (tmp_path / "out/checkpoints/progress.json").write_text(
        '{"step": 3, "total_steps": 9, "checkpoint": 3, "step_seconds": 2400.5, "stopped": false}\n'
    )
    code, error, calls = submit("--time=1-0", "--", SCRIPT)
    assert code == 2 and not calls and "a step of this run took 2400 s" in error
    assert submit("--time=1-0", "--", SCRIPT, STEP_SECONDS=3000)[0] == 0


def test_options_and_the_run_are_handed_over(submit):
    code, _, calls = submit("-N", "4", "--gres=gpu:h100:8", "--time=2-0", "--array=1-3", "--",
        SCRIPT, "a.b=1 2",
                            STEP_SECONDS=600)  # fmt: skip
    assert code == 0
    (call,) = calls
    assert call == (
        "CHAIN_LINK=1 REQUEUE= --parsable --job-name=quickstart_cpu --signal=B:USR1@600 -N 4 "
        f"--gres=gpu:h100:8 --time=2-0 --array=1-3 examples/slurm/train.sbatch {SCRIPT} a.b=1 2"
    )


def test_links_of_a_chain_depend_on_each_other(submit):
    code, _, calls = submit("--time=60", "--chain=3", "--", SCRIPT)
    assert code == 0
    assert [call.split(" --parsable")[0] for call in calls] == [
        f"CHAIN_LINK={i} REQUEUE=0" for i in (1, 2, 3)
    ]
    assert "--dependency" not in calls[0]
    assert "--dependency=afternotok:1 --kill-on-invalid-dep=yes" in calls[1]
    assert "--dependency=afternotok:2 --kill-on-invalid-dep=yes" in calls[2]


def test_gpus_of_a_request():
    source = (ROOT / "scripts/slurm/submit.sh").read_text()
    function = source[source.index("gpus_of() {") :].split("\n}\n")[0] + "\n}\n"
    requests = {"gpu:8": "8", "gpu:h100:8": "8", "nvme:100,gpu:a100_80gb:4": "4",
        "gpu:8,nvme:100": "8", "gpu:h100": "1",
                "gpu": "1", "nvme:100": ""}  # fmt: skip
    for request, gpus in requests.items():
        done = subprocess.run(
            ["bash", "-c", f"{function}gpus_of {request}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == gpus, request


@pytest.mark.parametrize(
    ("options", "gpus"), [(("--gres", "gpu:h100:2,nvme:100"), 2), (("--gpus-per-node=3",), 3)]
)
def test_the_dry_run_is_for_the_nodes_and_gpus_asked_for_and_the_plan_is_shown(
    options, gpus, tmp_path
):
    """The run script is a real one; sbatch is not reached, because the batch does not divide by
    three.
    """
    recorder = tmp_path / "sbatch"
    recorder.write_text("#!/usr/bin/env bash\necho 1\n")
    recorder.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/slurm/submit.sh"), "--nodes=2", "--time=60", *options, "--",
         "examples/run_quickstart_cpu.sh", "+capo=grpo"], capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": sys.prefix,
            "OUTPUT_DIR": str(tmp_path / "out"),
             "DATA_DIR": str(tmp_path), "MODEL_PATH": "Qwen/Qwen2.5-0.5B", "NPROCS": "4",
             "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    if gpus == 2:
        assert done.returncode == 0, done.stderr
        assert "# Plan" in done.stdout and "job 1: examples/run_quickstart_cpu.sh" in done.stdout
    else:
        assert done.returncode == 2
        assert (
            "submit.sh: the run would be refused: " in done.stderr
            and "NGPUS_PER_NODE=3" in done.stderr
        )
