# SPDX-License-Identifier: Apache-2.0
"""The one module that knows versions: differences between megatron-core 0.16 (Python 3.11) and 0.17 to 0.19 (3.12).

Everything else in the project is written against what the versions have in common.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace


def shim_mbridge() -> None:
    """mbridge 0.15.1 reads ``ModelType.encoder_and_decoder`` (``mbridge/core/util.py:83``), gone in mcore 0.17."""
    from mbridge.core import util
    from megatron.core.enums import ModelType

    if not hasattr(ModelType, "encoder_and_decoder"):
        util.ModelType = SimpleNamespace(
            encoder_or_decoder=ModelType.encoder_or_decoder, encoder_and_decoder="never equal to a ModelType"
        )


def import_checkpoint_modules() -> None:
    """Import now what megatron-core >= 0.19 imports at the first save, so that ``torch_view`` sees those modules."""
    for name in ("state_dict_saver", "filesystem_async", "fully_parallel", "torch"):
        name = f"megatron.core.dist_checkpointing.strategies.{name}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
