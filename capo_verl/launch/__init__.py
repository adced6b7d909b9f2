# SPDX-License-Identifier: Apache-2.0
"""Starting, stopping and resuming runs: what the scripts in ``examples/`` and ``scripts/slurm/`` need in Python."""
