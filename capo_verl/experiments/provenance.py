# SPDX-License-Identifier: Apache-2.0
"""Provenance of measured numbers (:mod:`capo_verl.commands.measure.provenance`)."""

from __future__ import annotations

from capo_verl.commands.measure.provenance import commit, processor

__all__ = ["commit", "processor"]
