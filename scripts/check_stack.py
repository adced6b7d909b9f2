#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reports which supported stack is installed and what is missing; works before anything is
installed.

python scripts/check_stack.py [--stack cpu|gpu] [--json]

Exit code 0 if a stack is complete, 1 if none is.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from capo_verl.plugin.stack import main
except ModuleNotFoundError as e:
    sys.exit(f"check_stack.py: {e}")

if __name__ == "__main__":
    sys.exit(main())
