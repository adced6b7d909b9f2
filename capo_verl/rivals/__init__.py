# SPDX-License-Identifier: Apache-2.0
"""Losses of the same literature as plain functions of tensors, one file each; torch only.

>>> RIVALS["dcpo"](old_log_prob, log_prob, advantages, response_mask, eps_low=0.1)

``docs/rivals.md`` states papers, equations and what deviates. Inside verl: ``+rival=dcpo``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from capo_verl.config.rivals import RIVAL_SPECS, RivalConfig
from capo_verl.rivals.advantage_reweighting import loss_advantage_reweighting
from capo_verl.rivals.aspo import loss_aspo
from capo_verl.rivals.bapo import loss_bapo
from capo_verl.rivals.common import Metrics
from capo_verl.rivals.cpgd import loss_cpgd
from capo_verl.rivals.dcpo import loss_dcpo
from capo_verl.rivals.entropy_mask import loss_entropy_mask
from capo_verl.rivals.gtpo import loss_gtpo
from capo_verl.rivals.lopti import loss_lopti
from capo_verl.rivals.minpro import loss_minpro
from capo_verl.rivals.pspo import loss_pspo
from capo_verl.rivals.spo import loss_spo

__all__ = ["RIVALS", "Metrics", "Rival"]


@dataclass(frozen=True)
class Rival:
    """One rival; calling it calls its loss with the paper's knobs."""

    name: str
    paper: str
    """arXiv number."""
    knobs: dict[str, Any]
    """Knobs with their defaults."""
    needs: frozenset[str]
    """Keyword inputs besides the four tensors.

    ``entropy`` ``[B, T]``, ``group`` ``[B]`` int64, ``tokens`` ``[B, T]``, or ``epoch``, how often
    the batch was used before (int).
    """
    loss: Callable[..., tuple[Tensor, Metrics]]
    """Losses ``[B, T]`` and 0-dim metrics of four tensors ``[B, T]``.

    ``loss(old_log_prob, log_prob, advantages, response_mask, **knobs, **inputs)``
    """

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        **given: Any,
    ) -> tuple[Tensor, Metrics]:
        """The per-token losses ``[B, T]`` and metrics, for inputs and checked knobs.

        Raises:
            ValueError: for an unknown or invalid knob, or a missing input.
        """
        missing = self.needs - {"epoch"} - given.keys()
        if given.get("entropy_max", self.knobs.get("entropy_max", 0.0)) is None:
            missing -= {"entropy"}  # then nothing looks at them
        if missing:
            raise ValueError(f"the loss {self.name} needs the argument {min(missing)!r}")
        inputs = {key: given.pop(key) for key in (*self.needs, "dp_group") if key in given}
        knobs = RivalConfig.from_mapping({"name": self.name, **given}).knobs
        return self.loss(
            old_log_prob, log_prob, advantages, response_mask, **asdict(knobs), **inputs
        )


_LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "entropy_mask": loss_entropy_mask,
    "lopti": loss_lopti,
    "advantage_reweighting": loss_advantage_reweighting,
    "dcpo": loss_dcpo,
    "bapo": loss_bapo,
    "aspo": loss_aspo,
    "cpgd": loss_cpgd,
    "spo": loss_spo,
    "pspo": loss_pspo,
    "minpro": loss_minpro,
    "gtpo": loss_gtpo,
}

RIVALS: dict[str, Rival] = {
    name: Rival(name, spec.paper, spec.defaults(), spec.needs, _LOSSES[name])
    for name, spec in RIVAL_SPECS.items()
}
