# SPDX-License-Identifier: Apache-2.0
"""The filter's verdict on every token of a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from capo_verl.core.penalty import PenaltyTerms


class Stage(NamedTuple):
    """The measurements and verdict of one granularity, each of the shape of ``actions``."""

    granularity: str
    objective_shift: Tensor
    """m_H of the token, or of its sequence or batch; 0 where the stage did not look (outside the
    mask, rejected before).
    """
    policy_shift: Tensor
    """m_F, likewise."""
    objective_ok: Tensor
    """bool, the m_H test was passed."""
    policy_ok: Tensor
    """bool, the m_F test was passed."""
    verdict: Tensor
    """bool, inside the mask and passed both tests of this and of all earlier stages."""


@dataclass(frozen=True)
class CapoOutput:
    """Result of :meth:`CapoFilter.evaluate`; every tensor has the shape of ``actions``."""

    objective_shift: Tensor
    """m_H in units of the advantage, from the first granularity of the config."""
    policy_shift: Tensor
    """m_F in nats, likewise. Token granularity: defined at all positions unless ``skip_masked``."""
    accepted: Tensor
    """bool, the tokens to train on, inside the response mask. It is the response mask with
    ``mode="track"``, with soft weights and once the guard has stopped the filtering.
    """
    weights: Tensor
    """Factor of the token's loss, or of its advantage, 0 outside the response mask: 0 or 1 as
    ``accepted``, with soft weights in 0..1.
    """
    trust_weights: Tensor
    """``weights`` as they were if the filter did not only track and had not been stopped."""
    in_trust_region: Tensor
    """bool, the verdict of all stages, inside the response mask.

    Equal to ``accepted`` with ``mode="filter"`` and hard weights.
    """
    in_support: Tensor
    """bool, whether the taken token is among the top k."""
    problems: dict[str, Tensor] = field(repr=False)
    """Problem of the inputs -> bool, true where it is found inside the response mask.

    All False unless ``check_values=False``.
    """
    stages: tuple[Stage, ...] = field(repr=False)
    """The granularities in the order in which they were applied."""
    penalty_terms: PenaltyTerms | None = field(default=None, repr=False)
    """For ``curvature_penalty``; None unless the config asks for a penalty."""
