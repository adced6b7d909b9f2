# SPDX-License-Identifier: Apache-2.0
"""What people see of a run: figures (``capo-verl plot``) and an interactive page (``capo-verl
report``), from logs on disk.
"""
