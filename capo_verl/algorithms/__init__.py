# SPDX-License-Identifier: Apache-2.0
"""Policy losses and advantage estimators registered with verl. Importing the package registers them."""

from capo_verl.algorithms import advantages, losses

__all__ = ["advantages", "losses"]
