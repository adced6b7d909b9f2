# SPDX-License-Identifier: Apache-2.0
"""No word to the Hugging Face hub, to which TRL reports its trainers: before any test here imports
it.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
