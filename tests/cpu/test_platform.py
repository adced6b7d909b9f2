# SPDX-License-Identifier: Apache-2.0
"""The CPU platform, verl's process groups on it, the view of torch, and that switching it on is
cheap.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import types

import pytest
import torch

from capo_verl.cpu import process_group
from capo_verl.cpu.megatron import torch_view
from tests.helpers.spawn import RankError, run_on_ranks


def test_verl_selects_it() -> None:
    from verl.plugin.platform import get_platform
    from verl.utils import device

    assert type(get_platform()).__name__ == "PlatformCPU"
    assert (device.get_device_name(), device.get_nccl_backend(), device.get_resource_name()) == (
        "cpu",
        "gloo",
        "GPU",
    )
    assert get_platform().ray_resource_options(2) == {"num_gpus": 2}
    assert not get_platform().is_platform_available(use_smi_check=True), "never detected by itself"


def test_device_id_is_a_device_and_an_index() -> None:
    from verl.utils.device import get_device_id, get_device_name

    assert torch.zeros(1, device=get_device_id()).device == torch.device("cpu")
    assert torch.device(f"{get_device_name()}:{get_device_id()}") == torch.device("cpu:0")
    assert f"{pickle.loads(pickle.dumps(get_device_id()))}" == "0"


def test_device_module_answers_what_verl_asks() -> None:
    from verl.utils.device import get_torch_device

    module = get_torch_device()
    module.manual_seed(3)
    state, drawn = module.get_rng_state(), torch.rand(1)
    module.set_rng_state(state)
    assert torch.equal(torch.rand(1), drawn)
    assert (
        not module.is_available() and module.device_count() == 0 and module.mem_get_info() == (0, 0)
    )
    module.synchronize()
    module.empty_cache()
    with pytest.raises(AttributeError):
        module.no_such_function  # noqa: B018


def test_import_is_cheap() -> None:
    """It is imported by the plugin in every process, also by those that never build an engine."""
    code = (
        "import sys, capo_verl.cpu.platform;"
        "print([m for m in sys.modules if m.startswith(('megatron', 'mbridge', 'verl.workers'))])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip().splitlines()[-1] == "[]"


def _verl_process_groups() -> tuple:
    torch.distributed.destroy_process_group()
    import verl.utils.distributed as module

    process_group.patch(module)
    process_group.patch(module)
    module.initialize_global_process_group_ray(timeout_second=60)
    total = torch.tensor([1.0 + torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    return (
        total.item(),
        module.initialize_global_process_group(timeout_second=60),
        torch.distributed.get_backend(),
    )


def test_verl_process_groups_use_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", ports[0])
    monkeypatch.setenv("SECOND_PORT", ports[1])
    assert run_on_ranks(_verl_process_groups, 2) == [
        (3.0, (0, 0, 2), "gloo"),
        (3.0, (1, 1, 2), "gloo"),
    ]


def test_torch_view_redirects_megatron_only(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = types.ModuleType("megatron.fake"), types.ModuleType("other.fake")
    for module in (inside, outside):
        module.torch = torch
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert "megatron.fake" in torch_view.redirect_cuda_to_cpu()
    assert "megatron.fake" not in torch_view.redirect_cuda_to_cpu()
    assert outside.torch is torch and inside.torch is not torch
    assert inside.torch.zeros(2, device="cuda").device.type == "cpu"
    assert inside.torch.empty_like(torch.ones(2), device="cuda:0").device.type == "cpu"
    assert inside.torch.cuda.current_device() == torch.device("cpu")
    assert inside.torch.Tensor is torch.Tensor and inside.torch.nn is torch.nn


def test_cuda_method_stays_and_comes_back() -> None:
    layer = torch.nn.Linear(2, 2)
    method = torch.Tensor.cuda
    with torch_view.cuda_method_stays():
        assert layer.cuda(0) is layer and layer.weight.device.type == "cpu"
    assert torch.Tensor.cuda is method


def _fail_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("this one")
    torch.distributed.barrier()


def _sleep() -> None:
    import time

    time.sleep(60)


def test_run_on_ranks_reports_the_first_failure() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*ValueError: this one"):
        run_on_ranks(_fail_on_rank_one, 2)
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 still run after 2 s"):
        run_on_ranks(_sleep, 1, timeout=2)


def test_variables_of_rollout_servers_are_the_users_where_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from verl.plugin.platform import get_platform

    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    given = get_platform().rollout_env_vars()
    assert given == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "0"}
