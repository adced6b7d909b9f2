# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_inputs import make_inputs
from tests.slurm.two_nodes import TwoNodes, why_not

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[TwoNodes]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Sockets lie below it: every other temporary folder has too long a name.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    process = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    two_nodes = TwoNodes(folder, index=int(process.removeprefix("gw")))
    try:
        two_nodes.start()
        yield two_nodes
    finally:
        two_nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Job:
    """A submitted job and what became of it."""

    def __init__(self, cluster: TwoNodes, number: int, output: Path, log: Path):
        self.cluster, self.number, self.output, self.log = cluster, number, output, log
        self._released: set[int] = set()

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def state(self) -> dict[str, str]:
        return self.cluster.state(self.number)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def logs(self, attempt: int) -> Path:
        return self.output / "logs" / f"{self.number}.{attempt}"

    def wait_until(self, happened, timeout: float, ended_is_fine: bool = False) -> None:
        """Poll; a requeued job is let start after three seconds, which Slurm would do after two
        minutes. At once would be too
        early: a credential that is not younger than the end of the job's former life is revoked,
            and the job fails.
        """
        deadline = time.monotonic() + timeout
        while not happened():
            state = self.state
            life = int(state["Restarts"])
            if (
                state["JobState"] == "PENDING"
                and state["Reason"] == "BeginTime"
                and life not in self._released
            ):
                self._released.add(life)
                self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now+3")
            ended = state["JobState"] in (
                "COMPLETED",
                "FAILED",
                "CANCELLED",
                "TIMEOUT",
                "NODE_FAIL",
            )
            about = (
                f"{state['JobState']} "
                f"{state['ExitCode']}\n{self.printed}\n{self.cluster.log(self.number)}"
            )
            assert not ended or ended_is_fine, about
            assert time.monotonic() < deadline, about
            time.sleep(0.3)

    def wait(self, timeout: float = 300) -> str:
        """The state in which the job ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_until(lambda: self.state["JobState"] in ended, timeout, ended_is_fine=True)
        return self.state["JobState"]

    def left_behind(self) -> list[str]:
        """Processes and folders of this job's Ray clusters that still exist."""
        root = self.cluster.folder
        left = [str(path) for path in root.glob(f"ray{self.number}.*")]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    f"CAPO_VERL_RAY_NODE={root}/ray{self.number}.".encode()
                    in (process / "environ").read_bytes()
                ):
                    left.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (
                FileNotFoundError,
                ProcessLookupError,
                PermissionError,
            ):  # has just ended, or is nobody we know
                continue
        return left


@pytest.fixture
def submit(cluster, inputs, tmp_path):
    """Submit a run of the CPU quickstart's launcher with a tiny model: ``submit(*overrides,
    options=[...], **environment)``.
    """

    def submitted(*overrides: str, options: tuple[str, ...] = ("--nodes=2", "--time=30"),
        script: str | Path =
                  "examples/run_quickstart_cpu.sh", name: str = "run",
                  **environment: str | int | Path | None) -> Job:  # fmt: skip
        log = tmp_path / f"{name}.out"
        variables = {
            "VENV": os.environ.get("VIRTUAL_ENV") or sys.prefix, "PYTHONPATH": str(ROOT),
            "DATA_DIR": inputs, "MODEL_PATH": inputs / "model", "OUTPUT_DIR": tmp_path / name,
            "RAY_TMP_ROOT": cluster.folder, "RAY_CPUS_PER_NODE": 12, "STEP_SECONDS": 60,
            "VERL_PLATFORM": "cpu",
            # Two nodes share two cores: as few processes as possible, and not those at low
            # priority.
            "RAY_enable_worker_prestart": 0, "RAY_prestart_worker_first_driver": 0,
            "RAY_worker_niceness": 0,
            "TRAIN_BATCH_SIZE": 4, "ROLLOUT_N": 4, "MAX_RESPONSE_LENGTH": 8, "LR_WARMUP_STEPS": 2,
            "ACTOR_LR": 3e-3,
            "TOTAL_TRAINING_STEPS": 8, "TEST_FREQ": -1, "VAL_BEFORE_TRAIN": "False", "SAVE_FREQ": 3,
            "CAPO": "grpo", **environment,
        }  # fmt: skip
        arguments = [
            f"reward.custom_reward_function.path={inputs / 'reward.py'}",
            "~reward.custom_reward_function.reward_kwargs",
            "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
            "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
            *overrides,
        ]
        printed = cluster.call(
            "bash", str(ROOT / "scripts/slurm/submit.sh"), "--no-check", "--gres=gpu:1",
            f"--output={log}", *options, "--", str(script), *arguments,
            environment={key: None if value is None else str(value) for key,
                value in variables.items()},
        )  # fmt: skip
        numbers = [
            int(line.split()[1].rstrip(":"))
            for line in printed.splitlines()
            if line.startswith("job ")
        ]
        return Job(cluster, numbers[0], Path(variables["OUTPUT_DIR"]), log)

    yield submitted
    cluster.cancel_all()  # of a test that failed
