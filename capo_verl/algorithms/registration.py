# SPDX-License-Identifier: Apache-2.0
"""Importing this module registers our policy losses and advantage estimators with verl."""

from capo_verl.algorithms import advantages, losses, rival_losses

__all__ = ["advantages", "losses", "rival_losses"]
