# SPDX-License-Identifier: Apache-2.0
import sys

sys.exit("scripts/prepare_data.py is now: capo-verl data")
