# SPDX-License-Identifier: Apache-2.0
"""The embedded default: what verl and Megatron-Core need in order to train on a CPU over gloo.

The method (``capo_verl.core``) and the engines (``capo_verl.engines``) know nothing of this
package; deleting it would not touch them. ``capo_verl.plugin.register`` switches it on when
``VERL_PLATFORM=cpu``.

``platform``       verl's device interface, for a CPU
``process_group``  verl's process groups, for gloo alone
``replay_buffer``  verl's replay buffer, polling often
``expert_weights`` names of the weights of experts
``megatron/``      verl's Megatron engine, without CUDA, Transformer Engine and Triton
``fsdp/``          verl's FSDP engine, and its sequence parallelism without flash attention
``rollout/``       the rollout backend ``actor_rollout_ref.rollout.name=hf``
``quickstart/``    a real task and a small model, trained by ``capo-verl quickstart``
``smollm2/``       a pretrained model, SmolLM2-135M-Instruct
"""
