# SPDX-License-Identifier: Apache-2.0
"""What of an asynchronous trainer is refused before it starts, and that the launchers' are not."""

from __future__ import annotations

import pytest

from capo_verl.launch.dry_run import composing
from capo_verl.plugin.checks import asynchronous
from capo_verl.plugin.checks.asynchronous import BACKEND, MODE, STEPS, check_trainer_mode
from capo_verl.plugin.checks.sizes import check_sizes
from tests.launch.launchers import CPU, command_line

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
BYPASS = "algorithm.rollout_correction.bypass_mode=True"


@pytest.fixture(scope="module")
def compose():
    with composing() as compose_one:
        yield compose_one


@pytest.fixture
def configure(tmp_path, compose):
    def make(*overrides: str, script: str = CPU[0], **variables: str):
        variables = {"TRAINER_MODE": "separate_async", "MODEL_PATH": tmp_path, **variables}
        _, *given = command_line(script, tmp_path, *overrides, **variables)
        return compose([override for override in given if not override.startswith("hydra.")])

    return make


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(asynchronous, "on_cpu", lambda: True)


@pytest.mark.parametrize("script", CPU)
@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_the_launchers_pass(configure, on_a_cpu, script, mode):
    config = configure(script=script, TRAINER_MODE=mode, PARAMETER_SYNC_STEP="2")
    check_trainer_mode(config)
    check_sizes(config)


@pytest.mark.parametrize(
    "overrides",
    [
        (f"{MODEL}.lora.rank=8", f"{MODEL}.lora.merge=True"),
        (f"{ACTOR}.megatron.use_distributed_optimizer=False", BYPASS),
        ("trainer.use_v1=False", f"{MODE}=none"),
    ],
    ids=str,
)
def test_what_passes(configure, on_a_cpu, overrides):
    check_trainer_mode(configure(*overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((f"{MODE}=async",), "set it to one of sync, colocate_async, separate_async"),
        ((f"{ROLLOUT}.nnodes=0",), f"{ROLLOUT}.nnodes=0: set it"),
        ((f"{ROLLOUT}.n_gpus_per_node=0",), f"{ROLLOUT}.n_gpus_per_node=0: set it"),
        ((f"{STEPS}=4",), f"{STEPS}=4 x {ACTOR}.ppo_mini_batch_size=8 = 32: change one of them"),
        ((f"{MODEL}.lora.rank=8",), f"set {MODEL}.lora.merge=True, or {MODE}=colocate_async"),
        ((f"{MODEL}.lora_rank=8",), f"set {MODEL}.lora.merge=True, or {MODE}=colocate_async"),
        (
            (f"{ACTOR}.megatron.use_distributed_optimizer=False",),
            f"set {ACTOR}.megatron.use_distributed_optimizer=True, or {BYPASS}",
        ),
    ],
    ids=str,
)
def test_what_is_refused(configure, on_a_cpu, overrides, said):
    with pytest.raises(ValueError, match=MODE) as refused:
        check_trainer_mode(configure(*overrides))
    assert said in str(refused.value)


@pytest.mark.parametrize(("cpu", "needed"), [(True, "gloo"), (False, "nccl")])
def test_a_way_to_the_servers(configure, monkeypatch, cpu, needed):
    monkeypatch.setattr(asynchronous, "on_cpu", lambda: cpu)
    with pytest.raises(ValueError, match=f"{BACKEND}=naive .* set it to {needed}"):
        check_trainer_mode(configure(f"{BACKEND}=naive"))


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_a_way_between_gpus(configure, on_a_cpu, mode):
    with pytest.raises(ValueError, match=f"{BACKEND}=nccl .* on a CPU set it to naive or gloo"):
        check_trainer_mode(configure(f"{BACKEND}=nccl", TRAINER_MODE=mode))
