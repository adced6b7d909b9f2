# SPDX-License-Identifier: Apache-2.0
import sys

sys.exit("scripts/calibration_study.py is now: python -m capo_verl.experiments.calibration")
