# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the filter: time, memory and bandwidth against the formulation as published.

What it measures is in :mod:`capo_verl.commands.measure`. Here:

``markdown``   tables, and their place in docs/performance.md
``chart``      the picture
``profiling``  the time of a call by operator
"""
