# SPDX-License-Identifier: Apache-2.0
"""CAPO (Curvature-Aware Policy Optimization, arXiv 2510.00819) for verl and Megatron.

``CapoConfig`` and ``CapoFilter`` work in any trainer; inside verl the plugin does the wiring
(``+capo=grpo``).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from capo_verl.config import CapoConfig

if TYPE_CHECKING:
    from capo_verl.core.filter import CapoFilter

__all__ = ["CapoConfig", "CapoFilter", "__version__"]

__path__.append(f"{__path__[0]}/moved")  # modules under their old names

try:
    __version__ = version("capo-verl")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    # Lazy, because Hydra scans `hydra_plugins` in every process and must not pay for torch.
    if name == "CapoFilter":
        from capo_verl.core.filter import CapoFilter

        return CapoFilter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
