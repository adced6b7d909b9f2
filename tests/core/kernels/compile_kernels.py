# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for a GPU, which needs none: ``python -m tests.core.kernels.compile_kernels
CAPABILITY`` prints JSON.

A process of its own, because in the interpreter the kernels are not compilable.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from capo_verl.core.kernels.fused.ahead_of_time import compile_all


def resources(cubin: bytes) -> str:
    """Registers, stack and shared memory as the assembler reports them."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout


if __name__ == "__main__":
    compiled = compile_all(int(sys.argv[1])).items()
    json.dump(
        {name: {"ptx": asm["ptx"], "resources": resources(asm["cubin"])} for name, asm in compiled},
        sys.stdout,
    )
