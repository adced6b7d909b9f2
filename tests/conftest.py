# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter then. Triton reads this when it is first imported, by whichever test.
    os.environ["TRITON_INTERPRET"] = "1"
