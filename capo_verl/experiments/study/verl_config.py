# SPDX-License-Identifier: Apache-2.0
"""A run of the verl tier: a launcher of this repository and its overrides. Pure Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

LAUNCHERS = ("quickstart", "smollm2")


@dataclass(frozen=True)
class VerlRunConfig:
    """One run of verl's ``main_ppo``.

    Raises:
        ValueError: naming the key, the value found and what is allowed.
    """

    launcher: str = "quickstart"
    """``quickstart`` (tiny Qwen2, TP2, CPU) or ``smollm2`` (SmolLM2-135M)."""
    seed: int = 1
    lr: float = 2e-4
    steps: int = 20
    evaluations: int = 4
    """Number of held-out evaluations after the start; must divide ``steps``."""
    overrides: tuple[str, ...] = field(default_factory=tuple)
    """Hydra overrides of the method, such as ``+capo=kl_budget``."""
    settings: tuple[str, ...] = field(default_factory=tuple)
    """Hydra overrides of every method."""

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher={self.launcher!r}: expected one of {', '.join(LAUNCHERS)}")
        if self.evaluations < 1 or self.steps % self.evaluations:
            raise ValueError(f"evaluations={self.evaluations!r}: must divide steps={self.steps}")
        object.__setattr__(self, "lr", float(self.lr))
        for name in ("overrides", "settings"):
            object.__setattr__(self, name, tuple(str(x) for x in getattr(self, name)))

    @classmethod
    def from_mapping(cls, knobs: Mapping[str, Any]) -> VerlRunConfig:
        """A run from plain data.

        Raises:
            ValueError: for an unknown key (lists the valid ones) or an invalid value.
        """
        valid = [f.name for f in fields(cls)]
        for key in knobs:
            if key not in valid:
                raise ValueError(
                    f"{key} is not a key of a verl run. Valid keys: {', '.join(valid)}"
                )
        return cls(**knobs)

    def to_dict(self) -> dict[str, Any]:
        """The run as plain JSON data."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def run_id(self) -> str:
        """First 16 hex digits of the SHA-256 of :meth:`to_dict`."""
        text = json.dumps({"version": 1, "tier": "verl", **self.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
