# SPDX-License-Identifier: Apache-2.0
"""``capo-verl doctor`` as a user runs it: where all is well, and where something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.commands.doctor.command import doctor, rows

ENGINES = (
    "capo_verl.cpu.megatron.engine.CpuMegatronEngine",
    "capo_verl.cpu.fsdp.engine.CpuFsdpEngine",
)
BREAK = "sys.modules['capo_verl.plugin.losses'] = None"  # the import fails, whatever the reason
WITHOUT_RAY = "--no-ray: leave that out to see whether workers load the plugin"
WITHOUT_KERNELS = "--no-kernels: leave that out to see whether the kernels compile or run"


@pytest.mark.ray
def test_all_is_well_here():
    pytest.importorskip("triton")
    done = doctor(interpreter=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stderr == ""  # no remarks of verl on the platform
    lines = done.stdout.splitlines()
    assert lines[0] == "Platform: cpu"
    found = {
        line[8:30].strip(): (line[:8].strip(), line[30:])
        for line in lines[1:]
        if line[:8].strip() in ("ok", "warn", "skipped")
    }
    stack = found.pop("software stack")
    assert (
        stack[0] in ("ok", "warn") and "verl" in stack[1]
    )  # other versions than the tested ones are a warning
    assert found.pop("kernels")[0] == "ok"
    assert found == {
        "plugin installed": ("ok", "verl loads capo_verl.plugin.register"),
        "registered with verl": (
            "ok",
            "policy loss 'capo', advantage estimator 'reinforce', hooks in 12 modules of verl",
        ),
        "Megatron engine": ("ok", f"verl uses {ENGINES[0]}"),
        "FSDP engine": ("ok", f"verl uses {ENGINES[1]}"),
        "switch composes": (
            "ok",
            "6 presets of +capo and 16 of +rival compose, their knobs arrive checked",
        ),
        "Ray worker": (
            "ok",
            f"a worker of a Ray of its own: policy loss 'capo', {' and '.join(ENGINES)}",
        ),
        "example": (
            "skipped",
            "--example examples/run_....sh looks at a launcher's configuration, memory and disk",
        ),
    }
    assert f"all 9 checks passed ({'1 warn, ' * (stack[0] == 'warn')}1 skipped)" in lines


def test_a_broken_registration_fails_by_name_and_the_other_checks_are_made():
    done = doctor("--json", "--no-ray", "--no-kernels", before=BREAK)
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "FAIL"
    found = rows(done)
    status, message = found["registered with verl"]
    assert status == "FAIL"
    assert message.startswith(
        "capo_verl could not register with verl (policy losses and advantage estimators: "
        "ModuleNotFoundError: "
    )
    assert found["switch composes"][0] == "FAIL"
    assert found["Megatron engine"] == ("ok", f"verl uses {ENGINES[0]}")
    assert found["Ray worker"] == ("skipped", WITHOUT_RAY)
    assert found["kernels"] == ("skipped", WITHOUT_KERNELS)
    assert list(found)[-1] == "example"


OVERRIDDEN = """
import verl.workers.engine
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
class Other(FSDPEngineWithLMHead): pass
EngineRegistry._engines["language_model"]["megatron"]["cpu"] = Other
from capo_verl.config import PRESETS, Preset
PRESETS["bad"] = Preset("of no use", {"policy_shift_max": -1})
print("what somebody prints")
"""


def test_an_engine_that_does_not_win_and_a_bad_preset():
    done = doctor(
        "--json",
        "--no-ray",
        "--no-kernels",
        before="import contextlib\nwith contextlib.redirect_stdout(sys.stderr): "
        f"exec({OVERRIDDEN!r})",
    )
    assert done.returncode == 1
    found = rows(done)
    assert found["Megatron engine"] == (
        "FAIL",
        "verl would use __main__.Other, not CAPO's engine: something registered it over this "
        "project's: name only capo_verl in "
        "VERL_USE_EXTERNAL_PLUGINS and unset VERL_USE_EXTERNAL_MODULES",
    )
    assert found["FSDP engine"][0] == "ok"
    assert found["switch composes"] == (
        "FAIL",
        "+capo=bad: ValueError: capo.policy_shift_max=-1: a threshold must be >= 0 (0 or null "
        "switches the test off); install a "
        "supported verl and this package again (scripts/check_stack.py)",
    )


@pytest.mark.ray
def test_excluded_from_verls_plugins_in_driver_and_worker():
    done = doctor("--json", "--no-kernels", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    found = rows(done)
    why = (
        "VERL_USE_EXTERNAL_PLUGINS=none keeps verl from loading capo_verl: unset it, or add "
        "capo_verl to it"
    )
    assert found["plugin installed"] == ("FAIL", why)
    assert found["Ray worker"] == ("FAIL", f"in a worker of a Ray of its own: {why}")
    assert found["registered with verl"] == ("FAIL", f"nothing is registered: {why}")
    # Without the plugin verl does not know the platform "cpu".
    no_engines = f"verl has no engines here: nothing is registered: {why}"
    assert found["FSDP engine"] == found["Megatron engine"] == ("FAIL", no_engines)


CLUSTER = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
    object_store_memory=80 << 20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
def test_a_cluster_whose_workers_do_not_load_the_plugin():
    """The driver is in order; only the cluster was started in another environment."""
    quick = {
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",
    }
    env = {**os.environ, **quick, "VERL_USE_EXTERNAL_PLUGINS": "another", "RAY_AUTH_MODE": "token"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLUSTER], env=env, text=True, **pipes
    ) as cluster:
        try:
            address = cluster.stdout.readline().strip()
            done = doctor("--json", "--no-kernels", "--ray-address", address, RAY_AUTH_MODE="token")
        finally:
            cluster.stdin.close()
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    found = rows(done)
    assert found["Ray worker"] == (
        "FAIL",
        f"in a worker of the Ray at {address}: VERL_USE_EXTERNAL_PLUGINS=another keeps verl from "
        "loading capo_verl: unset it, or add capo_verl to it",
    )
    assert [name for name, (status, _) in found.items() if status == "FAIL"] == ["Ray worker"]
