#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Does the trust region help, when, and which one? Runs the studies of examples/studies and makes
their tables.

python -m capo_verl.experiments.study run capo_verl/experiments/study/studies/main.yaml --jobs 2
--results results python -m capo_verl.experiments.study tables
capo_verl/experiments/study/studies/main.yaml --results results
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from capo_verl.plugin.missing_packages import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("study.py", "capo_verl.experiments.study.cli", extra="study"))
