#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Does the trust region help, when, and which one? Runs the studies of examples/studies and makes their tables.

python scripts/study.py run examples/studies/main.yaml --jobs 2 --results results
python scripts/study.py tables examples/studies/main.yaml --results results
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from capo_verl.extras import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("study.py", "capo_verl.study.cli", extra="study"))
