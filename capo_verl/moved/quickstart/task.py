# SPDX-License-Identifier: Apache-2.0
from capo_verl.data.gym import compute_score as compute_score
