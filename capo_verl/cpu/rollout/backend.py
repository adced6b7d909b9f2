# SPDX-License-Identifier: Apache-2.0
"""Registration of the backend with verl.

Imports none of its parts: it runs in a hook while verl's rollout package is being imported.
"""

from __future__ import annotations

from capo_verl.cpu.rollout import NAME


def _load_replica() -> type:
    from capo_verl.cpu.rollout.replica import HFReplica

    return HFReplica


def register() -> None:
    """Add the backend to verl's two registries.

    Both load the classes when they are first asked for.
    """
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register(NAME, _load_replica)
    _ROLLOUT_REGISTRY[(NAME, "async")] = "capo_verl.cpu.rollout.replica.HFServerAdapter"
