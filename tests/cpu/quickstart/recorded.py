# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: recorded from verl's file logger (GRPO), and the same with CAPO's entries
added.
"""

from __future__ import annotations

import json
from pathlib import Path

GRPO = Path(__file__).parent / "data" / "grpo.jsonl"
COMPLETIONS_PER_STEP = 128
REJECTION = {1: 0.0, 2: 0.0125, 3: 0.02, 4: 0.015, 5: 0.01, 6: 0.0075}
POLICY_SHIFT = {1: 2e-6, 2: 1.5e-5, 3: 4e-5, 4: 3e-5, 5: 2e-5, 6: 1e-5}


def write_capo(path: Path) -> Path:
    """The recorded run with ``capo/`` metrics."""
    lines = []
    for line in GRPO.read_text().splitlines():
        entry = json.loads(line)
        if entry["step"] > 0:
            entry["data"]["capo/rejection_rate"] = REJECTION[entry["step"]]
            entry["data"]["capo/policy_shift_mean"] = POLICY_SHIFT[entry["step"]]
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))
    return path
