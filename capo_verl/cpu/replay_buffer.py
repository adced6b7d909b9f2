# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffer, polling every 50 ms.

verl looks for finished rollouts every two seconds (``verl/trainer/ppo/v1/replay_buffer.py``,
``poll_interval``), longer than a whole step of a small model. Switched on by
``trainer.v1.sampler.custom_sampler.path=pkg://capo_verl.cpu.replay_buffer`` and
``trainer.v1.sampler.custom_sampler.name=FastReplayBuffer``.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.05


class FastReplayBuffer(ReplayBuffer):
    """verl's synchronous replay buffer with a short poll interval.

    verl does not pass its dynamic filtering (DAPO) to custom buffers
    (``verl/trainer/ppo/v1/trainer_base.py:165``).
    """

    def __init__(self, *args: Any, poll_interval: float = POLL_SECONDS, **kwargs: Any) -> None:
        super().__init__(*args, poll_interval=poll_interval, **kwargs)
