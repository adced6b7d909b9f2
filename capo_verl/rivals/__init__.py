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
from capo_verl.rivals.bnpo import bnpo_advantages
from capo_verl.rivals.common import Metrics, loss_clipped, loss_on_policy
from capo_verl.rivals.cpgd import loss_cpgd
from capo_verl.rivals.d3s import d3s_advantages
from capo_verl.rivals.dcpo import loss_dcpo
from capo_verl.rivals.empg import empg_advantages
from capo_verl.rivals.entropy_mask import loss_entropy_mask
from capo_verl.rivals.gtpo import gtpo_advantages
from capo_verl.rivals.lopti import loss_lopti
from capo_verl.rivals.minpro import loss_minpro
from capo_verl.rivals.pacs import loss_pacs, pacs_advantages
from capo_verl.rivals.pspo import loss_pspo
from capo_verl.rivals.rpg import loss_rpg
from capo_verl.rivals.spo import loss_spo

__all__ = ["RIVALS", "Metrics", "Rival"]


Loss = Callable[..., tuple[Tensor, Metrics]]
_CLIP = ("clip_low", "clip_high", "dual_clip")


@dataclass(frozen=True)
class WholeGroups:
    """A rival that changes advantages by looking at whole groups or batches.

    A micro-batch may hold a part of them: verl's trainer calls ``advantages`` for all responses of
    a step, and the registered loss is ``loss``.
    """

    advantages: Loss
    """Advantages ``[B, T]`` and metrics of ``advantages, response_mask, **knobs, **inputs``."""
    loss: Loss
    """Losses of the advantages as they are; its knobs are those of PPO's clip, or none."""

    def split(self, knobs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of ``advantages`` and those of ``loss``."""
        clip = {key: knobs[key] for key in _CLIP if key in knobs}
        return {key: value for key, value in knobs.items() if key not in clip}, clip

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        **given: Any,
    ) -> tuple[Tensor, Metrics]:
        """Both in one, for a batch of whole groups."""
        given, clip = self.split(given)
        advantages, metrics = self.advantages(advantages, response_mask, **given)
        losses, more = self.loss(old_log_prob, log_prob, advantages, response_mask, **clip)
        return losses, metrics | more


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
    loss: Loss
    """Losses ``[B, T]`` and 0-dim metrics of four tensors ``[B, T]``.

    ``loss(old_log_prob, log_prob, advantages, response_mask, **knobs, **inputs)``
    """
    whole_groups: WholeGroups | None = None
    """How it falls into advantages and a loss, if a part of a group is not enough for it."""

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
        also = ("dp_group", *RIVAL_SPECS[self.name].optional)
        inputs = {key: given.pop(key) for key in (*self.needs, *also) if key in given}
        knobs = RivalConfig.from_mapping({"name": self.name, **given}).knobs
        return self.loss(
            old_log_prob, log_prob, advantages, response_mask, **asdict(knobs), **inputs
        )


_WHOLE_GROUPS = {
    "gtpo": WholeGroups(gtpo_advantages, loss_on_policy),
    "bnpo": WholeGroups(bnpo_advantages, loss_clipped),
    "empg": WholeGroups(empg_advantages, loss_clipped),
    "d3s": WholeGroups(d3s_advantages, loss_clipped),
    "pacs": WholeGroups(pacs_advantages, loss_on_policy),
}

_LOSSES: dict[str, Loss] = {
    **_WHOLE_GROUPS,
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
    "rpg": loss_rpg,
    "pacs": loss_pacs,  # off-policy its advantages depend on the ratios
}

RIVALS: dict[str, Rival] = {
    name: Rival(
        name, spec.paper, spec.defaults(), spec.needs, _LOSSES[name], _WHOLE_GROUPS.get(name)
    )
    for name, spec in RIVAL_SPECS.items()
}
