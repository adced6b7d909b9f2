# SPDX-License-Identifier: Apache-2.0
"""docs/outside_verl.md shows the example's own lines."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/outside_verl.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]


def test_the_core_is_the_examples():
    core = re.search(r"```python\n(    hidden, logits.*?)```", PAGE, re.S).group(1)
    assert core in (ROOT / "examples/outside_verl/plain_pytorch.py").read_text(encoding="utf-8")
    assert len(core.splitlines()) == 8


def test_all_other_commands_install_an_extra_that_exists():
    assert [command for command in COMMANDS if not command.startswith("python ")] == [
        "pip install '.[trl]'"
    ]
    assert "\ntrl = [\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
