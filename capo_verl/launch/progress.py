# SPDX-License-Identifier: Apache-2.0
"""How far a run has come, as one small file beside its checkpoints.

A batch script cannot ask the trainer, which is an actor somewhere in a Ray cluster. Both see the folder of the checkpoints.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from capo_verl.launch.files import replace_text

FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """After a training step."""

    step: int
    """The last step that was trained, counted from 1."""
    total_steps: int
    checkpoint: int | None
    """Step of the newest checkpoint that this attempt has written, None before the first."""
    step_seconds: float
    """The longest step of this attempt, with its checkpoint."""
    stopped: bool = False
    """The run ends here because it was asked to, not because it is complete."""

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps and not self.stopped

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Replace the file in ``folder``, which is made if missing; a reader never sees half of it."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Progress | None:
        """What the last step left; None before the first one.

        Raises:
            ValueError: if the file holds something else.
        """
        path = Path(folder) / FILE
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as e:
            raise ValueError(f"{path} is not what a run writes there ({e}); delete it") from e
