#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Study of the trust region: does it help, when, and in which form?

Runs the studies of ``studies/`` and makes their tables.

    python -m capo_verl.experiments.study run capo_verl/experiments/study/studies/main.yaml --jobs 2
    python -m capo_verl.experiments.study tables capo_verl/experiments/study/studies/main.yaml
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from capo_verl.plugin.missing_packages import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("capo_verl.experiments.study", "capo_verl.experiments.study.cli", extra="study"))
