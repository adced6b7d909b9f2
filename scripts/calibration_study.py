#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The calibration study: what m_F and m_H predict, what happened, tables and figures.

python scripts/calibration_study.py run examples/calibration_study.yaml --output outputs/calibration_study
python scripts/calibration_study.py draw docs/evidence --insert docs/evidence.md     # from the tables that are there
"""

import sys

from capo_verl.extras import run

if __name__ == "__main__":
    sys.exit(run("calibration_study.py", "capo_verl.calibration.study_cli", extra="study"))
