# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffers on a CPU: they look for finished rollouts every 50 ms.

By default they look every two seconds (``verl/trainer/ppo/v1/replay_buffer.py``,
``poll_interval``), longer than a whole step of a small model.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

POLL_SECONDS = 0.05


def patch(module: ModuleType) -> None:
    """Shorten the interval of ``verl.trainer.ppo.v1.replay_buffer``, unless it is given."""
    initialize = module.ReplayBuffer.__init__

    @functools.wraps(initialize)
    def patched(self: Any, *args: Any, poll_interval: float = POLL_SECONDS, **kwargs: Any) -> None:
        initialize(self, *args, poll_interval=poll_interval, **kwargs)

    module.ReplayBuffer.__init__ = patched
