# SPDX-License-Identifier: Apache-2.0
from capo_verl.config import KLBudgetConfig as KLBudgetConfig
