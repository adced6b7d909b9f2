# SPDX-License-Identifier: Apache-2.0
"""The pretrained tier: SmolLM2-135M in the loop of the tiny tier, over its whole vocabulary.

``config``      the keys of a run
``vocabulary``  text to tokens, and back
``tasks``       families of text problems
``model``       the model as a policy: packed forward passes, cached sampling, LoRA
``warm_start``  the base policy of a task
"""
