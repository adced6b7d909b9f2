# SPDX-License-Identifier: Apache-2.0
"""The method, in torch alone: support -> optimizer model -> curvature -> trust region, put in order
by ``filter``.
"""

from capo_verl.core.filter import CapoFilter
from capo_verl.core.logits import ProjectedLogits
from capo_verl.core.output import CapoOutput
from capo_verl.core.penalty import curvature_penalty

__all__ = ["CapoFilter", "CapoOutput", "ProjectedLogits", "curvature_penalty"]
