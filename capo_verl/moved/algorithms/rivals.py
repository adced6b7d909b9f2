# SPDX-License-Identifier: Apache-2.0
from capo_verl.rivals import RIVALS as RIVALS
from capo_verl.rivals import Metrics as Metrics
from capo_verl.rivals import Rival as Rival
