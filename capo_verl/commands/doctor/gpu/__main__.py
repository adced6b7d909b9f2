# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.commands.doctor.gpu PART DEVICE`` prints what a part found, as JSON."""

from __future__ import annotations

import json
import sys

import torch

from capo_verl.commands.doctor.check import stdout_to_stderr
from capo_verl.commands.doctor.gpu import parts

if __name__ == "__main__":
    with stdout_to_stderr():
        rows = parts.PARTS[sys.argv[1]].examine()(torch.device(sys.argv[2]))
    print(json.dumps(rows))
