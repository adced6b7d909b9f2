# SPDX-License-Identifier: Apache-2.0
"""Predictions of m_F and m_H against what a step does: the true KL divergence and the true change
of the objective.

``rollouts``   the batch of one step
``policy``     a causal language model as body and LM head
``step``       one real optimizer step, with everything predicted before and measured after it
``predictors`` what is compared with m_F
``statistics`` rank correlation, slope, ratio, AUROC, intervals over steps
``propose``    thresholds and a KL budget for a model, from measured steps
``sample``     completions and rewards for a user's model and data
``calibration`` the order of all this
``pictures``   predicted against true
"""
