# SPDX-License-Identifier: Apache-2.0
"""Knobs beyond the paper's filter, as both engines are tested with them."""

from __future__ import annotations

from typing import Any

from tests.engines.megatron.capo_cases import KNOBS

SOFT: dict[str, Any] = {
    **KNOBS,
    "weighting": "soft",
    "policy_shift": "exact",
    "policy_shift_max": {"target_rejection": 0.3, "memory": 0.5},
}
PENALTY: dict[str, Any] = {**KNOBS, "policy_penalty": 30.0, "objective_penalty": 3.0}
