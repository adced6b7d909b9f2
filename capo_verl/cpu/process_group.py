# SPDX-License-Identifier: Apache-2.0
"""verl's process groups on a CPU: gloo alone.

verl asks torch for ``cpu:gloo,<device>:<backend>`` (``verl/utils/distributed.py:63`` and ``:89``).
On a CPU that reads ``cpu:gloo,cpu:gloo``, which torch refuses: "Duplicate device type cpu in
backend string".
"""

from __future__ import annotations

import os
from datetime import timedelta
from types import ModuleType

import torch.distributed


def patch(module: ModuleType) -> None:
    """Make the two initializers of ``verl.utils.distributed`` ask for gloo.

    It must run before anyone imports their names.

    Args:
        module: ``verl.utils.distributed``, just imported.
    """
    upstream_ray = module.initialize_global_process_group_ray
    if getattr(upstream_ray, "_capo_verl_cpu", False):
        return

    def initialize_global_process_group(timeout_second: int = 36000) -> tuple[int, int, int]:
        torch.distributed.init_process_group(
            backend="gloo",
            timeout=timedelta(seconds=timeout_second),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )
        return (
            int(os.environ["LOCAL_RANK"]),
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
        )

    def initialize_global_process_group_ray(
        timeout_second: int | None = None, backend: str | None = None
    ) -> None:
        upstream_ray(timeout_second=timeout_second, backend=backend or "gloo")

    initialize_global_process_group_ray._capo_verl_cpu = True  # type: ignore[attr-defined]
    vars(module).update(
        initialize_global_process_group=initialize_global_process_group,
        initialize_global_process_group_ray=initialize_global_process_group_ray,
    )
