# SPDX-License-Identifier: Apache-2.0
"""The embedded default: what verl and Megatron-Core need in order to train on a CPU over gloo.

The method itself (``capo_verl.core``) and the engine (``capo_verl.engines.megatron``) know nothing
of this package; deleting it would not touch them. ``capo_verl.plugin.register`` switches it on when
``VERL_PLATFORM=cpu``:

====================== ==================================================================================
``platform.py``        verl's device interface, for a CPU
``process_group.py``   verl's process groups, for gloo alone
``torch_view.py``      Megatron-Core's literal ``device="cuda"``, sent to the CPU
``attention.py``       exact causal attention for padded and packed batches
``rng.py``             Megatron-Core's random states, kept in the CPU generator
``bridge.py``          mbridge's architectures, built from Megatron-Core's own (non-TE) layers
``linear_cross_entropy.py`` verl's fused LM head and cross-entropy, without Triton
``grad_clip.py``       Megatron-Core's gradient clipping, without its test for CUDA tensors
``distributed_optimizer.py`` Megatron-Core's distributed optimizer, without CUDA type names
``engine.py``          verl's Megatron engine, made of the pieces above
``fsdp_engine.py``     verl's FSDP engine
``ulysses.py``         its sequence parallelism, without flash attention
``sampling.py``        batched sampling from a Hugging Face model
``rollout.py``         the rollout backend ``actor_rollout_ref.rollout.name=hf``: what it is, how verl finds it
``rollout_server.py``  its server
``rollout_replica.py`` its start, and its supply of weights
``replay_buffer.py``   verl's replay buffer, polling often
====================== ==================================================================================
"""
