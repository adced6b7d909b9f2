# SPDX-License-Identifier: Apache-2.0
"""The method, in torch alone: support -> optimizer model -> curvature -> trust region, put in order by ``filter``."""

from capo_verl.core.filter import CapoFilter
from capo_verl.core.output import CapoOutput
from capo_verl.core.penalty import curvature_penalty
from capo_verl.core.projected_logits import ProjectedLogits

__all__ = ["CapoFilter", "CapoOutput", "ProjectedLogits", "curvature_penalty"]
