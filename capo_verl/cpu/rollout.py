# SPDX-License-Identifier: Apache-2.0
"""The rollout backend ``actor_rollout_ref.rollout.name=hf``: a Hugging Face model in one Ray actor per replica.

verl's servers (vLLM, SGLang, TensorRT-LLM) need accelerators. What verl's V1 trainer expects of a backend instead:

* ``HFReplica`` starts the server (``rollout_replica.py``; verl's side is ``verl/workers/rollout/replica.py``);
* ``HFServerAdapter`` lives in every trainer rank and hands the weights over (``rollout_replica.py``;
  ``verl/workers/rollout/base.py``);
* ``HFServer`` answers ``generate``, many requests at a time (``rollout_server.py``;
  ``verl/workers/rollout/llm_server.py:150``).

This module imports none of them: it runs in a hook while verl's rollout package is still being imported.
"""

from __future__ import annotations

NAME = "hf"


def _load_replica() -> type:
    from capo_verl.cpu.rollout_replica import HFReplica

    return HFReplica


def register() -> None:
    """Add the backend to verl's two registries. Both load the classes when they are first asked for."""
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register(NAME, _load_replica)
    _ROLLOUT_REGISTRY[(NAME, "async")] = "capo_verl.cpu.rollout_replica.HFServerAdapter"
