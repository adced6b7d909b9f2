# SPDX-License-Identifier: Apache-2.0
import sys

sys.exit("scripts/plan.py is now: capo-verl plan")
