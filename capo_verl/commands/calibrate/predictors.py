# SPDX-License-Identifier: Apache-2.0
"""Quantities known before the step that could predict the KL divergence of a token, which m_F has
to beat.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LABELS = {
    "policy_shift": "$m_F$",
    "policy_shift_exact": "$m_F$ exact Fisher",
    "policy_shift_sgd": "$m_F$ SGD model",
    "head_step": "LM head's real step",
    "entropy": "entropy",
    "surprisal": "$-\\log p$",
    "advantage": "$|A|$",
    "advantage_miss": "$A^2(1-p)^2$",
    "hidden": "$\\|h\\|^2$",
}
"""Predictor -> how it is written.

``head_step`` knows the real update of the LM head: the best the last layer can tell.
"""

PREDICTIONS = ("policy_shift", "policy_shift_exact", "policy_shift_sgd", "head_step")
"""Those in nats, whose ratio to the true KL divergence means something."""


def predictors(tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All predictors that can be had from the columns of
    :class:`capo_verl.commands.calibrate.step.StepMeasurement.tokens`.

    Args:
        tokens: column -> ``[N]`` float64.

    Returns:
        Name -> ``[N]``, larger where a larger change is predicted.
    """
    log_prob, advantage = tokens["log_prob"], tokens["advantage"]
    simple = {
        "entropy": tokens["entropy"],
        "surprisal": -log_prob,
        "advantage": np.abs(advantage),
        "advantage_miss": advantage**2 * np.expm1(log_prob) ** 2,
        "hidden": tokens["hidden"],
    }
    return {**{name: tokens[name] for name in PREDICTIONS if name in tokens}, **simple}
