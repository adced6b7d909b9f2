#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What will a run need per GPU, and does it fit?

python scripts/plan.py Qwen/Qwen2.5-Math-7B --tp 2
DRY_RUN=1 bash examples/run_qwen2_5_32b_megatron.sh >resolved.yaml && python scripts/plan.py
--config resolved.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capo_verl.plugin.missing_packages import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("plan.py", "capo_verl.launch.plan_cli", extra="cpu"))
