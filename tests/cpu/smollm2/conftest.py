# SPDX-License-Identifier: Apache-2.0
"""verl chooses its platform once per process, when it is first asked: before any test here imports
it.
"""

import os

os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
