# SPDX-License-Identifier: Apache-2.0
"""The study harness: methods x learning rates x tasks x seeds, in one table.

Started by ``capo_verl.experiments.study``.
"""
