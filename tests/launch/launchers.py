# SPDX-License-Identifier: Apache-2.0
"""What a launcher would run: its command line, taken by an interpreter that only prints its
arguments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from capo_verl.config import PRESETS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GPU = (
    "run_qwen2_5_math_7b_megatron.sh",
    "run_qwen2_5_32b_megatron.sh",
    "run_qwen3_8b_megatron.sh",
    "run_qwen3_30b_a3b_megatron.sh",
)
CPU = ("run_quickstart_cpu.sh", "run_smollm2_135m_cpu.sh")
SWITCH = ("off", *PRESETS)
OURS = (
    "CAPO",
    "DRY_RUN",
    "NNODES",
    "SLURM_JOB_NUM_NODES",
    "RAY_ADDRESS",
    "VERL_PLATFORM",
    "VERL_FILE_LOGGER_PATH",
    "REGIME",
    "SEED",
    "LOSS_MODE",
    "INFER_BACKEND",
    "ROLLOUT_KV_CACHE_MIB",
    "EXPERIMENT_NAME",
    "CAPO_PLAN",
    "GPU_MEMORY_GIB",
)


def environment(tmp_path: Path, **variables: object) -> dict[str, str]:
    """This process' environment, without what would reach a launcher by accident, with
    ``variables``.
    """
    clean = {key: value for key, value in os.environ.items() if key not in OURS}
    defaults = {
        "OUTPUT_DIR": tmp_path / "run", "CAPO_VENV": sys.prefix, "CAPO_SKIP_INSTALL": 1,
        "PYTHONPATH": ROOT, "DATA_DIR": tmp_path / "data",
    }  # fmt: skip
    return {**clean, **{key: str(value) for key, value in {**defaults, **variables}.items()}}


def call(
    script: str, tmp_path: Path, *arguments: str, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments], env=environment(tmp_path, **variables),
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def command_line(script: str, tmp_path: Path, *arguments: str, **variables: object) -> list[str]:
    """The module and the overrides with which a launcher calls Python.

    Raises:
        AssertionError: if the launcher refuses.
    """
    stub = tmp_path / "print_arguments"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(0o755)
    # The SmolLM2 launcher takes the interpreter of the environment that it makes.
    venv = tmp_path / "venv/bin"
    venv.mkdir(parents=True, exist_ok=True)
    if not (venv / "python").exists():
        (venv / "python").symlink_to(stub)
    done = call(
        script, tmp_path, *arguments, **{"PYTHON": stub, "CAPO_VENV": venv.parent, **variables}
    )
    assert done.returncode == 0, done.stderr
    options, module, *overrides = done.stdout.split("\0")[:-1][2:]
    assert options == "-m"
    return [module, *overrides]
