# SPDX-License-Identifier: Apache-2.0
"""What a rank with one of verl's engines imports: ten seconds, which each rank would take anew."""

import peft  # noqa: F401
import pytest  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import trl  # noqa: F401
import verl.models.mcore.mbridge  # noqa: F401
import verl.workers.engine.fsdp.transformer_impl  # noqa: F401
import verl.workers.engine.megatron.transformer_impl  # noqa: F401
from transformers import AutoModelForImageTextToText

import capo_verl.cpu.megatron.bridge  # noqa: F401

# verl looks for a model among these, which imports each one's configuration.
list(AutoModelForImageTextToText._model_mapping.keys())
