# SPDX-License-Identifier: Apache-2.0
"""Every knob, its default and its check.

Standard library only: Hydra reads the presets in every process.

``capo``       the filter's knobs
``kl_budget``  those of the KL budget that controls the learning rate
``rivals``     those of the rival losses
``presets``    the values of the switch ``+capo=NAME``
``checks``     checks of single values
"""

from capo_verl.config.capo import CapoConfig, TargetRejection
from capo_verl.config.kl_budget import KLBudgetConfig
from capo_verl.config.presets import FROM_OPTIMIZER, PRESETS, Preset, parse_knobs, verl_knobs

__all__ = [
    "FROM_OPTIMIZER", "PRESETS", "CapoConfig", "KLBudgetConfig", "Preset", "TargetRejection",
    "parse_knobs", "verl_knobs",
]  # fmt: skip
