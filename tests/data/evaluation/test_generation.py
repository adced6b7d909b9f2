# SPDX-License-Identifier: Apache-2.0
"""``capo-verl evaluate`` with verl's rollout servers on a CPU: generated, stopped, continued,
scored again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.helpers import warm

pytest.importorskip("verl")
pytestmark = pytest.mark.e2e

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = float(sum(map(ord, solution_str)) % 2)
    return {"score": right, "acc": right, "pred": solution_str[:1]}
"""


def evaluate(*arguments: str, interpreter: str = "") -> str:
    """Standard output.

    Args:
        interpreter: default: one that has imported the large packages.
    """
    environment = {
        **os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1",
        "RAY_enable_worker_prestart": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [interpreter or warm.python(), "-W", "ignore", "-m", "capo_verl.commands", "evaluate",
         *arguments],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_generate_stop_continue_and_score(tmp_path):
    from capo_verl.data.prepare import write_parquet
    from capo_verl.data.rows import make_row
    from capo_verl.data.templates import TEMPLATES
    from tests.helpers.tiny_model import make_tiny_qwen2

    actor = tmp_path / "run/global_step_3/actor"
    make_tiny_qwen2(actor / "huggingface")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [
        make_row("sums", f"{i}+{i}=", TEMPLATES["plain"], str(2 * i), "math", index=i, split="test")
        for i in range(6)
    ]
    write_parquet(rows, tmp_path / "test.parquet")
    common = [
        "--model", str(tmp_path / "run"), "--data", str(tmp_path / "test.parquet"), "-n", "4",
        "--max-prompt-length", "64",
        "--max-response-length", "12", "--reward", str(tmp_path / "reward.py"),
    ]  # fmt: skip

    # Two servers share the work; ended is simulated by what an interrupted run leaves: some lines,
    # the last cut off.
    output = tmp_path / "out"
    options = [*common, "--gpus", "2", "--output", str(output)]
    first = evaluate(*options, interpreter=sys.executable)
    assert "avg@4" in first
    complete = (output / "completions.jsonl").read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in complete]
    assert Counter(record["sample"] for record in records) == dict.fromkeys(range(4), 6)
    assert len({record["response"] for record in records}) > 20
    assert all(0 < record["tokens"] <= 12 for record in records)
    assert {record["truncated"] for record in records if record["tokens"] < 12} <= {False}

    kept = complete[:9]
    (output / "completions.jsonl").write_bytes(b"".join(kept) + complete[9][:20])
    evaluate(*options)
    resumed = (output / "completions.jsonl").read_bytes().splitlines(keepends=True)
    assert resumed[:9] == kept and len(resumed) == 24
    # The server's seed moved on: nothing is sampled twice, but for answers that end at once.
    answers = Counter(
        (r["key"], r["response"]) for r in map(json.loads, resumed) if r["tokens"] >= 6
    )
    assert answers.total() > 12 and max(answers.values()) == 1

    # Scores: those of the reward function, and again without a server.
    import pyarrow.parquet as parquet

    scored = parquet.read_table(output / "scored.parquet").to_pylist()
    right = [float(sum(map(ord, record["response"])) % 2) for record in scored]
    assert [record["acc"] for record in scored] == right
    results = json.loads((output / "results.json").read_text())
    assert results["results"]["sums"]["avg@4"]["mean"] == pytest.approx(sum(right) / 24)
    assert 0 < sum(right) < 24
    evaluate("--data", str(tmp_path / "test.parquet"), "--output", str(output), "--score-only",
             "--reward", str(tmp_path / "reward.py"))  # fmt: skip
    assert json.loads((output / "results.json").read_text())["results"] == results["results"]
