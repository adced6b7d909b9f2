# SPDX-License-Identifier: Apache-2.0
"""verl's own ``main_ppo``, Ray and all, on two ranks: trained, killed, resumed, killed again, and
broken on one rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.tiny_inputs import make_inputs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e

# Python imports it in every process of the run, Ray's workers included.
SABOTAGE = """
import os, signal, wrapt

def at_step(step):
    return os.environ.get("RANK") == "1" and SEEN["saves"] == step

SEEN = {"saves": FIRST_STEP}

def wrap_save(module):
    save = module.save
    def saved(*args, **kwargs):
        SEEN["saves"] += 1
        if "KILL_IN_SAVE" in os.environ and at_step(int(os.environ["KILL_IN_SAVE"])):
            folder = os.path.dirname(module.directory(args[0]))
            os.makedirs(folder, exist_ok=True)  # the other rank may not have come here yet
            open(os.path.join(folder, "unfinished"), "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)
    module.save = saved

def wrap_filter(module):
    evaluate = module.CapoFilter.evaluate
    def evaluated(self, *args, **kwargs):
        if "RAISE_AFTER_SAVE" in os.environ and at_step(int(os.environ["RAISE_AFTER_SAVE"])):
            raise ArithmeticError("sabotage of rank 1 inside the filter")
        return evaluate(self, *args, **kwargs)
    module.CapoFilter.evaluate = evaluated

wrapt.register_post_import_hook(wrap_save, "capo_verl.engines.megatron.checkpoint")
wrapt.register_post_import_hook(wrap_filter, "capo_verl.core.filter")
"""

CAPO_AND_CHECKPOINTS = (
    "+capo=grpo",
    "actor_rollout_ref.actor.optim.lr=3e-3",
    "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
    "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    # with the mini-batches: four optimizer steps per rollout
    "actor_rollout_ref.actor.ppo_epochs=2",
    "trainer.save_freq=1",
    "trainer.resume_mode=auto",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def output(tmp_path):
    """Folder of the runs.

    A killed rank leaves Megatron's checkpoint process behind; it is known by its environment.
    """
    folder = tmp_path / "run"
    yield folder
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"OUTPUT_DIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except (
            FileNotFoundError,
            ProcessLookupError,
            PermissionError,
        ):  # ended by itself, or somebody else's
            continue


class Run:
    """One call of the launcher in a session of its own, so that all of it can be killed at once."""

    def __init__(self, inputs: Path, output: Path, name: str, steps: int, first_step: int,
                 overrides: tuple[str, ...] = CAPO_AND_CHECKPOINTS, **more: int | str):  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        hooks = output / f"hooks-{name}"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(SABOTAGE.replace("FIRST_STEP", str(first_step)))
        self.metrics_path = output / f"{name}.jsonl"
        self.log = output / f"{name}.log"
        environment = {
            **os.environ, "PYTHON": sys.executable, "DATA_DIR": str(inputs),
            "MODEL_PATH": str(inputs / "model"),
            "OUTPUT_DIR": str(output), "TRAIN_BATCH_SIZE": "4", "ROLLOUT_N": "4",
            "MICRO_BATCH_SIZE": "8",
            "MAX_RESPONSE_LENGTH": "8", "LR_WARMUP_STEPS": "0", "TOTAL_TRAINING_STEPS": str(steps),
            "TEST_FREQ": "-1", "VERL_FILE_LOGGER_PATH": str(self.metrics_path),
            **{key: str(value) for key, value in more.items()},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(hooks), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        environment.pop("VERL_PLATFORM", None)
        command = [
            "bash", str(ROOT / "examples/run_quickstart_cpu.sh"),
            f"reward.custom_reward_function.path={inputs / 'reward.py'}",
            "~reward.custom_reward_function.reward_kwargs", "trainer.val_before_train=False",
            *overrides,
        ]  # fmt: skip
        self._command, self._environment, self._output, self._starts = (
            command,
            environment,
            output,
            0,
        )
        self._start()

    def _start(self) -> None:
        self._starts += 1
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT,
                cwd=self._output, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> int | None:
        """The exit code, None while it runs."""
        code = self.process.poll()
        # Ray gives its own start 30 s (ray/_private/node.py), too little on a busy machine; nothing
        # of ours has run then.
        if (
            code
            and "The current node timed out during startup" in self.printed
            and self._starts < 2
        ):
            self._start()
            return None
        return code

    def wait(self, timeout: float = 560) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.ended()) is None:
            assert time.monotonic() < deadline, self.printed[-4000:]
            time.sleep(0.2)
        return code

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def metrics(self) -> list[dict]:
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        return [json.loads(line)["data"] for line in lines]

    def wait_until(self, happened, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.ended() is None, self.printed[-4000:]
            assert time.monotonic() < deadline, self.printed[-4000:]
            time.sleep(0.02)


def test_killed_broken_and_resumed(inputs, output):
    latest = output / "checkpoints/latest_checkpointed_iteration.txt"

    # A worker is killed while it writes the second checkpoint: the run ends by itself, the first
    # one counts.
    first = Run(inputs, output, "first", steps=4, first_step=0, KILL_IN_SAVE=2)
    assert first.wait() != 0, first.printed[-4000:]
    # Which comes first: Ray notices the dead worker, or the other rank its closed connection.
    reasons = (
        "ActorDiedError",
        "died unexpectedly",
        "Connection closed by peer",
        "Connection reset by peer",
    )
    assert any(reason in first.printed for reason in reasons), first.printed[-4000:]
    assert latest.read_text() == "1"
    assert (output / "checkpoints/global_step_1/actor/capo/dist_ckpt/.metadata").exists()
    assert (output / "checkpoints/global_step_2/actor/capo/unfinished").exists()
    assert [m["training/global_step"] for m in first.metrics] == [1]
    (metrics,) = first.metrics
    assert metrics["training/rollout_probs_diff_max"] < 1e-5
    assert 0 < metrics["capo/rejection_rate"] < 1
    assert 0 < metrics["capo/policy_shift_mean"] <= metrics["capo/policy_shift_max"]
    assert metrics["capo/filter_seconds"] > 0 and metrics["capo/batch_policy_shift_before"] > 0
    assert metrics["capo/batch_skipped"] == 0

    # It resumes from the first, writes the second anew, and is killed between that and the third,
    # all of it at once.
    second = Run(inputs, output, "second", steps=4, first_step=1)
    second.wait_until(lambda: latest.read_text() == "2")
    second.kill()
    assert "moments start empty" not in second.printed
    assert latest.read_text() in ("2", "3")  # a step is short
    done = int(latest.read_text())

    # It resumes from there; then one rank raises inside the filter, and its message ends the run,
    # at once.
    third = Run(inputs, output, "third", steps=6, first_step=done, RAISE_AFTER_SAVE=done + 1)
    assert third.wait() != 0
    ended = time.time()
    assert [m["training/global_step"] for m in third.metrics] == [done + 1]
    assert latest.read_text() == str(done + 1)
    assert "moments start empty" not in third.printed
    assert "ArithmeticError: sabotage of rank 1 inside the filter" in third.printed
    assert (
        ended - third.metrics_path.stat().st_mtime < 120
    )  # verl's collectives would wait for 600 s


def test_capo_trains_with_fsdp_and_lora(inputs, output):
    """The rollouts after the first step come from the merged adapter, in float32 like the actor."""
    overrides = (
        "+capo=grpo",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
        "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
        "trainer.save_freq=2",
    )
    run = Run(inputs, output, "fsdp", 2, 0, overrides, MODEL_ENGINE="dp", PYTHON=warm.python())
    assert run.wait() == 0, run.printed[-4000:]
    assert len(run.metrics) == 2 and "with LoRA the LM head is not trained" in run.printed
    for metrics in run.metrics:
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        assert metrics["actor/grad_norm"] > 0 and metrics["capo/policy_shift_mean"] > 0
    assert max(metrics["capo/rejection_rate"] for metrics in run.metrics) > 0
    assert (output / "checkpoints/global_step_2/actor/capo/moments.safetensors").exists()
