#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The calibration study: what m_F and m_H predict, what happened, tables and figures.

python -m capo_verl.experiments.calibration run capo_verl/experiments/calibration/study.yaml \\
    --output outputs/calibration_study
python -m capo_verl.experiments.calibration draw capo_verl/experiments/results
"""

import sys

from capo_verl.plugin.missing_packages import run

if __name__ == "__main__":
    sys.exit(
        run(
            "capo_verl.experiments.calibration",
            "capo_verl.experiments.calibration.study_cli",
            extra="study",
        )
    )
