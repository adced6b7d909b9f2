#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Score a checkpoint through verl's rollout servers: avg@n and pass@k with confidence intervals.
docs/data.md

python scripts/evaluate.py --model checkpoints/global_step_60 --data data/aime24/test.parquet -n 32
--output outputs/eval
VERL_PLATFORM=cpu python scripts/evaluate.py --model MODEL --data FILE -n 4 --output outputs/eval        # without a GPU
python scripts/evaluate.py --data data/aime24/test.parquet --output outputs/eval --score-only            # score again
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capo_verl.plugin.missing_packages import run

if __name__ == "__main__":
    sys.exit(run("evaluate.py", "capo_verl.data.evaluation.run", extra="data"))
