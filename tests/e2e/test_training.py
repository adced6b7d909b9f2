# SPDX-License-Identifier: Apache-2.0
"""verl's own ``main_ppo``, Ray and all, on two ranks: train with CAPO, stop, resume, and look at the metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": float(sum(c.isdigit() for c in solution_str)) / max(len(solution_str), 1), "acc": 0.0}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A random tiny model, a few prompts, a reward that varies."""
    import pandas as pd

    from tests.helpers.tiny_model import make_tiny_qwen2

    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_qwen2(folder / "model")
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"{i}+{i}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i},
        }
        for i in range(16)
    ]
    for split in ("train", "test"):
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder


def train(inputs: Path, output: Path, steps: int, *overrides: str) -> tuple[list[dict], str]:
    """Run the launcher; the metrics of each step, and everything it printed."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "DATA_DIR": str(inputs), "MODEL_PATH": str(inputs / "model"),
        "OUTPUT_DIR": str(output), "TRAIN_BATCH_SIZE": "4", "ROLLOUT_N": "4", "MICRO_BATCH_SIZE": "8",
        "MAX_RESPONSE_LENGTH": "8", "LR_WARMUP_STEPS": "0", "TOTAL_TRAINING_STEPS": str(steps), "TEST_FREQ": "-1",
        "VERL_FILE_LOGGER_PATH": str(output / f"metrics-{steps}.jsonl"),
    }  # fmt: skip
    environment.pop("VERL_PLATFORM", None)
    output.mkdir(parents=True, exist_ok=True)
    command = [
        "bash", str(ROOT / "examples/run_quickstart_cpu.sh"), f"reward.custom_reward_function.path={inputs / 'reward.py'}",
        "~reward.custom_reward_function.reward_kwargs", "trainer.val_before_train=False", *overrides,
    ]  # fmt: skip
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, cwd=output)
        # Ray gives its own start 30 s (ray/_private/node.py), too little on a busy machine; nothing of ours has run then.
        if "The current node timed out during startup" not in result.stdout + result.stderr:
            break
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    lines = Path(environment["VERL_FILE_LOGGER_PATH"]).read_text().splitlines()
    return [json.loads(line)["data"] for line in lines], result.stdout + result.stderr


def test_capo_trains_saves_and_resumes(inputs, tmp_path):
    output = tmp_path / "run"
    overrides = (
        "+capo=grpo",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
        "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_epochs=2",  # with the mini-batches: four optimizer steps per rollout
        "trainer.save_freq=1",
        "trainer.resume_mode=auto",
    )
    first, _ = train(inputs, output, 2, *overrides)
    assert len(first) == 2
    for metrics in first:
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        assert 0 <= metrics["capo/rejection_rate"] < 1
        assert 0 < metrics["capo/policy_shift_mean"] <= metrics["capo/policy_shift_max"]
        assert metrics["capo/filter_seconds"] > 0
        assert metrics["capo/batch_policy_shift_before"] > 0
    assert max(metrics["capo/rejection_rate"] for metrics in first) > 0
    checkpoint = output / "checkpoints/global_step_2"
    assert (checkpoint / "actor/capo/dist_ckpt/.metadata").exists()

    resumed, printed = train(inputs, output, 3, *overrides)
    assert [m["training/global_step"] for m in resumed] == [3]
    assert "moments start empty" not in printed
    # The same step again from the same checkpoint, without CAPO's moments: they start empty, and are seen to.
    forgetful = tmp_path / "forgetful"
    shutil.copytree(
        output / "checkpoints", forgetful / "checkpoints", ignore=shutil.ignore_patterns("global_step_3", "capo")
    )
    (forgetful / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    (again,), printed = train(inputs, forgetful, 3, *overrides)
    assert "was written without CAPO: its moments start empty" in printed
    # The same rollouts, whose scores arrive in any order; other decisions about their tokens.
    assert again["critic/score/mean"] == pytest.approx(resumed[0]["critic/score/mean"], rel=1e-6)
    assert again["capo/policy_shift_mean"] != resumed[0]["capo/policy_shift_mean"]


def test_capo_trains_with_fsdp_and_lora(inputs, tmp_path, monkeypatch):
    """The rollouts after the first step come from the merged adapter, in float32 like the actor."""
    monkeypatch.setenv("MODEL_ENGINE", "dp")
    steps, printed = train(
        inputs, tmp_path, 2, "+capo=grpo", "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
        "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
        "trainer.save_freq=2",
    )  # fmt: skip
    assert len(steps) == 2 and "with LoRA the LM head is not trained" in printed
    for metrics in steps:
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        assert metrics["actor/grad_norm"] > 0 and metrics["capo/policy_shift_mean"] > 0
    assert max(metrics["capo/rejection_rate"] for metrics in steps) > 0
    assert (tmp_path / "checkpoints/global_step_2/actor/capo/moments.safetensors").exists()
