# SPDX-License-Identifier: Apache-2.0
import sys

sys.exit("scripts/benchmark_filter.py is now: python -m capo_verl.experiments.benchmark")
