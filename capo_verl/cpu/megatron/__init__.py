# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core and verl's Megatron engine on a CPU.

``engine``                 verl's Megatron engine, made of the pieces below
``torch_view``             Megatron-Core's literal ``device="cuda"``, sent to the CPU
``bridge``                 mbridge's architectures, built from Megatron-Core's own (non-TE) layers
``megatron_bridge``        Megatron-Bridge, imported without Transformer Engine
``experts``                Megatron-Core's mixtures of experts, without its kernels
``attention``              exact causal attention for padded and packed batches
``linear_cross_entropy``   verl's fused LM head and cross-entropy, without Triton
``rng``                    Megatron-Core's random states, kept in the CPU generator
``grad_clip``              Megatron-Core's gradient clipping, without its test for CUDA tensors
``distributed_optimizer``  Megatron-Core's distributed optimizer, without CUDA type names
"""
