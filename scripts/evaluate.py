# SPDX-License-Identifier: Apache-2.0
import sys

sys.exit("scripts/evaluate.py is now: capo-verl evaluate")
