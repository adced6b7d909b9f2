# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for the GPUs they are meant for, although this machine may have none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=[80, 90], ids=["A100", "H100"])
def compiled(request, tmp_path_factory) -> dict[str, dict[str, str]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.core.kernels.compile_kernels", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_hardly_anything_spills_and_nothing_is_added_atomically(compiled):
    """Triton 3.6 keeps one loop-invariant word of best_keys in memory on an A100."""
    assert len(compiled) == 13
    for name, code in compiled.items():
        assert ".entry" in code["ptx"], name
        assert not re.search(r"\b(atom|red)\.", code["ptx"]), name
        stack, local = (
            int(re.search(rf" {kind}:(\d+) ", code["resources"])[1]) for kind in ("STACK", "LOCAL")
        )
        assert stack <= 8 and local == 0, (name, code["resources"])


def test_long_reads_are_vectorised(compiled):
    """16 bytes a thread where a program reads rows of moments, hidden states or logits."""
    for name in (
        "partial_sums fp32",
        "partial_sums bf16",
        "best_keys temperature=None",
        "row_sums add=False",
    ):
        assert "ld.global.v4.b32" in compiled[name]["ptx"], name
