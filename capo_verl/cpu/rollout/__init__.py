# SPDX-License-Identifier: Apache-2.0
"""The rollout backend ``actor_rollout_ref.rollout.name=hf``.

A Hugging Face model answers in one Ray actor per replica.

verl's servers of SGLang and TensorRT-LLM need accelerators; that of vLLM runs with its CPU build
(``vllm.py``). What verl's V1 trainer expects of a backend:

* ``HFReplica`` starts the server (``replica.py``; verl's side is
  ``verl/workers/rollout/replica.py``);
* ``HFServerAdapter`` lives in every trainer rank and hands the weights over (``replica.py``;
  ``verl/workers/rollout/base.py``);
* ``HFServer`` answers ``generate``, many requests at a time (``server.py``;
  ``verl/workers/rollout/llm_server.py:150``).
"""

NAME = "hf"
