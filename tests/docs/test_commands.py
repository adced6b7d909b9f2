# SPDX-License-Identifier: Apache-2.0
"""Every command in README and docs is executed, in a copy of the repository: see commands.py for
how.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.docs.commands import HOW, Command, How, commands, how
from tests.docs.markdown import ROOT
from tests.helpers.warm import environment_folder

pytest.importorskip("verl", reason="needs the extra cpu")
SECONDS = 600
COMMANDS = commands()
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = float(sum(map(ord, solution_str)) % 2)
    return {"score": right, "acc": right, "pred": solution_str[:1]}
"""
"""An untrained model gets some right."""
SHORT_CALIBRATION = {
    "tasks": ["sort8"],
    "base": 0.2,
    "layers": 2,
    "seeds": [1],
    "lrs": {"adam": [1e-3]},
    "steps": 14,
    "every": 2,
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of this repository, with the files that the commands name."""
    folder = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # some commands list what git has
    _models(folder)
    _data(folder)
    _runs(folder)
    study = yaml.safe_load((folder / "capo_verl/experiments/calibration/study.yaml").read_text())
    (folder / "capo_verl/experiments/calibration/study.yaml").write_text(
        yaml.safe_dump({**study, "tiny": SHORT_CALIBRATION})
    )
    recorder = folder / "bin/sbatch"
    recorder.parent.mkdir()
    recorder.write_text("#!/bin/sh\necho Submitted batch job 1 >&2\necho 1\n")
    recorder.chmod(0o755)
    return folder


def _models(folder: Path) -> None:
    from tests.helpers.tiny_model import make_tiny_qwen2

    make_tiny_qwen2(folder / "MODEL")
    shutil.copytree(folder / "MODEL", folder / "CHECKPOINT/global_step_50/actor/huggingface")


def _data(folder: Path) -> None:
    from capo_verl.data.prepare import write_parquet
    from capo_verl.data.rows import make_row
    from capo_verl.data.templates import TEMPLATES

    for split in ("train", "test"):
        rows = [
            make_row(
                "math", f"{i}+{i}=", TEMPLATES["plain"], str(2 * i), "math", index=i, split=split
            )
            for i in range(4)
        ]
        write_parquet(rows, folder / f"data/math/{split}.parquet")
        write_parquet(rows, folder / f"data/gsm8k/{split}.parquet")
    problems = [
        {"problem": f"What is {i}+{i}?", "solution": f"\\boxed{{{2 * i}}}", "answer": str(2 * i)}
        for i in range(4)
    ]
    (folder / "FOLDER").mkdir()
    for split in ("train", "test"):
        (folder / f"FOLDER/{split}.jsonl").write_text(
            "".join(json.dumps(p) + "\n" for p in problems)
        )
    (folder / "FILE").mkdir()
    mine = "".join(json.dumps({"Q": p["problem"], "A": p["answer"]}) + "\n" for p in problems)
    (folder / "FILE/train.jsonl").write_text(mine)
    (folder / "reward.py").write_text(REWARD)


def _runs(folder: Path) -> None:
    from tests.viewer.logs import capo_rows, write_file_log

    write_file_log(folder / "outputs/grpo/metrics.jsonl", capo_rows())
    write_file_log(folder / "outputs/capo/metrics.jsonl", capo_rows(offset=0.1))


def execute(command: Command, rule: How, checkout: Path) -> subprocess.CompletedProcess[str]:
    venv = environment_folder()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "VERL_"))},
        "PATH": f"{checkout / 'bin'}:{venv / 'bin'}:{Path(sys.executable).parent}:"
        f"{os.environ['PATH']}",
        "PYTHONPATH": str(checkout), "CAPO_VENV": str(venv), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    text = f"{rule.prefix} {command.text} {rule.append}".strip()
    if ">resolved.yaml" in text:
        text += " && cat resolved.yaml"
    return subprocess.run(
        ["bash", "-c", text], cwd=checkout, env=environment, capture_output=True, text=True,
        timeout=SECONDS, check=False
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            c, marks=[pytest.mark.ray] if how(c).ray else [], id=f"{c.places[0]} {c.text[:60]}"
        )
        for c in COMMANDS
    ],
)
def test_command(command: Command, checkout: Path) -> None:
    rule = how(command)
    if rule.needs and find_spec(rule.needs) is None:
        pytest.skip(f"needs {rule.needs}")
    for name in (
        rule.makes
    ):  # a file that the repository has, or that another command made, would prove nothing
        path = checkout / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    done = execute(command, rule, checkout)
    output = done.stdout + done.stderr
    assert done.returncode == rule.code, output[-3000:]
    assert re.search(rule.says, output) and rule.check(output), output[-3000:]
    for name in rule.makes:
        assert (checkout / name).exists(), output[-3000:]


def test_every_rule_is_used() -> None:
    used = {how(command).pattern for command in COMMANDS}
    assert [rule.pattern for rule in HOW if rule.pattern not in used] == []


def test_a_command_that_nobody_told_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"page.md:3: nobody says .* how to execute: rm -rf /"):
        how(Command("rm -rf /", ("page.md:3",)))
