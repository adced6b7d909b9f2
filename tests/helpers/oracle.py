# SPDX-License-Identifier: Apache-2.0
"""The oracle, which is in the package: ``capo-verl doctor --gpu`` asks it, too."""

from __future__ import annotations

from capo_verl.commands.measure.oracle import Oracle, Token, make_token, support

__all__ = ["Oracle", "Token", "make_token", "support"]
