# SPDX-License-Identifier: Apache-2.0
"""docs/outside_verl.md shows the example's own lines, and its commands run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the examples use transformers, which the extras cpu and trl install")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/outside_verl.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
RUNS = [command for command in COMMANDS if command.startswith("python ")]


def test_the_core_is_the_examples():
    core = re.search(r"```python\n(    hidden, logits.*?)```", PAGE, re.S).group(1)
    assert core in (ROOT / "examples/outside_verl/plain_pytorch.py").read_text(encoding="utf-8")
    assert len(core.splitlines()) == 8


def test_all_other_commands_install_an_extra_that_exists():
    assert [command for command in COMMANDS if command not in RUNS] == ["pip install '.[trl]'"]
    assert "\ntrl = [\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", RUNS)
def test_the_commands_run(command):
    if "trl_grpo" in command and find_spec("trl") is None:
        pytest.skip("TRL is not installed: pip install '.[trl]'")
    done = subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = [float(reward) for reward in re.findall(r"^step .* reward ([0-9.]+)", done.stdout, re.M)]
    assert len(rewards) == 60 and sum(rewards[-10:]) > sum(rewards[:10]) + 0.5
