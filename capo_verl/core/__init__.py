# SPDX-License-Identifier: Apache-2.0
"""The method, in torch alone: support -> optimizer model -> curvature -> trust region, put in order by ``filter``."""

from capo_verl.core.filter import CapoFilter, CapoOutput

__all__ = ["CapoFilter", "CapoOutput"]
