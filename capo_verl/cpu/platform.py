# SPDX-License-Identifier: Apache-2.0
"""A CPU for verl's ``PlatformRegistry``, registered at import.

``VERL_PLATFORM=cpu`` selects it.

verl asks its platform for everything that depends on the device, but ships accelerators only
(``verl/plugin/platform/platform_manager.py:172``). A rank is one process, and takes one unit of
Ray's resource ``GPU``: verl counts no other (``verl/single_controller/ray/base.py:230``). The units
are made up, and the command line must say how many there are:
``+ray_kwargs.ray_init.num_gpus=<ranks>``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

# verl's entropy (verl/utils/megatron/tensor_parallel.py:112) and Megatron-Core's @jit_fuser
# (megatron/core/jit.py) call torch.compile: half a minute of C++ in every process, for nothing at
# this size. torch reads this variable on every such call; its config object is no substitute,
# because what is set there holds for one thread only.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


ROLLOUT_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
"""Of verl's rollout servers, unless they are set: vLLM would bind its threads to cores that the
trainer's processes use as well.
"""


class CpuDeviceId(str):
    """Device id: ``"cpu"`` as the name of a device, ``0`` formatted as an index.

    verl uses it both ways: ``tensor.to(get_device_id())``, and
    ``f"{get_device_name()}:{get_device_id()}"`` (``verl/utils/megatron_utils.py:233``).
    """

    def __new__(cls) -> CpuDeviceId:
        return super().__new__(cls, "cpu")

    def __format__(self, format_spec: str) -> str:
        return "0"

    def __reduce__(self) -> tuple[type[CpuDeviceId], tuple[()]]:
        return (CpuDeviceId, ())


class CpuDeviceModule(ModuleType):
    """View of ``torch.cpu`` with the functions that verl expects of ``torch.cuda``.

    They are those of memory, random state and properties.
    """

    def __init__(self) -> None:
        super().__init__("capo_verl.cpu.device")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        """False: there is no accelerator memory to watch (``verl/utils/memory_utils.py:42``)."""
        return False

    def device_count(self) -> int:
        """0: no CUDA seeds for Megatron-Core (``verl/workers/engine/megatron/utils.py:35``)."""
        return 0

    def current_device(self) -> CpuDeviceId:
        return CpuDeviceId()

    def is_initialized(self) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    empty_cache = ipc_collect = reset_peak_memory_stats = set_per_process_memory_fraction = _nothing

    def _no_memory(self, *args: Any, **kwargs: Any) -> int:
        return 0

    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = _no_memory

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return (0, 0)

    def get_device_name(self, device: Any = None) -> str:
        """The key of verl's table of peak FLOP/s (``verl/utils/flops_counter.py``)."""
        return "CPU"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="CPU", total_memory=0, major=0, minor=0)


_DEVICE_MODULE = CpuDeviceModule()


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """A host without accelerators: one process is one device, gloo carries the collectives."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """False: a machine with an accelerator has a CPU as well."""
        return False

    def current_device(self) -> CpuDeviceId:
        return CpuDeviceId()

    def device_count(self) -> int:
        return 0

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return (None, None)

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """A name that nothing reads: no device is hidden from a rank."""
        return "CAPO_VERL_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """Variables of vLLM's processes, for one that shares its cores with the trainer's."""
        return {name: os.environ.get(name, value) for name, value in ROLLOUT_VARIABLES.items()}

    def cudart(self) -> None:
        return None
