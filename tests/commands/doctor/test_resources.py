# SPDX-License-Identifier: Apache-2.0
"""Memory and disk that an example needs, against machines that are made up."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capo_verl.commands.doctor import disk, memory
from capo_verl.commands.doctor.check import Broken
from capo_verl.commands.doctor.machine import Machine
from capo_verl.config import verl_knobs
from capo_verl.launch.plan import GIB, make_plan
from capo_verl.plugin.checks.model_shape import KNOWN
from capo_verl.plugin.checks.run_spec import RunSpec
from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.state_cases import save_and_go_on
from tests.helpers.spawn import run_on_ranks
from tests.helpers.tiny_model import make_tiny_qwen2

SHAPE = KNOWN["qwen/qwen2.5-math-7b"]
RUN = RunSpec(
    model="Qwen/Qwen2.5-Math-7B", gpus_per_node=8, tp=2, prompts=144, completions_per_prompt=8,
    mini_batch=144,
    tokens_per_gpu=16384, log_prob_tokens_per_gpu=16384, sequence_parallel=True, recompute="full",
    offload_parameters=True, offload_optimizer=True, rollout_memory=0.6, capo=verl_knobs("grpo"),
)  # fmt: skip
"""As examples/run_qwen2_5_math_7b_megatron.sh has it: docs/plan.md says 47.8 GiB in the rollout,
158 of the host.
"""
NODE = Machine(gpus=8, gpu_memory=79.6, gpu_free=79.0, memory=1000.0, memory_free=900.0)
ESTIMATE = (
    "estimated: 53.8 GiB per GPU (rollout, with 6 in reserve) of 79.6, and 158 GiB of host memory "
    "per node"
)


def look(here, run=RUN):
    plan = make_plan(run, SHAPE, here.memory if run.cpu else here.gpu_memory, must_fit=False)
    outcome = memory.compare(plan, run.model, here)
    return outcome.status, outcome.message


def test_it_fits():
    assert look(NODE) == ("ok", ESTIMATE)
    assert look(replace(NODE, gpu_free=None)) == ("ok", ESTIMATE)


def test_a_login_node_cannot_say():
    where = "run the doctor where the run will be, or set GPU_MEMORY_GIB"
    login = replace(NODE, gpus=0, gpu_free=None, memory=8.0, memory_free=4.0)
    assert look(login) == ("skipped", f"no GPU here to compare with, {ESTIMATE}: {where}")
    status, message = look(replace(login, gpu_memory=24.0))
    assert (
        status == "skipped"
        and "of 24.0, and 158 GiB of host memory per node (planned for 24.0 GiB it does not fit: "
        "Qwen"
        in message
    )


def test_short_of_what_others_use_is_a_warning():
    free = "but only 20.0 are free on one of the GPUs: end what else runs there first"
    assert look(replace(NODE, gpu_free=20.0)) == ("warn", f"{ESTIMATE}, {free}")
    free = "of whose 1000 only 100 are free: end other processes first"
    assert look(replace(NODE, memory_free=100.0)) == ("warn", f"{ESTIMATE}, {free}")


def test_what_cannot_fit_is_broken():
    with pytest.raises(
        Broken, match="^8 GPUs per node are asked for, 4 are here: set NGPUS_PER_NODE=4 "
    ):
        look(replace(NODE, gpus=4))
    with pytest.raises(
        Broken,
        match="^estimated: Qwen2.5-Math-7B does not fit: "
        "update needs 47.5 GiB per GPU .* of 34.0: ",
    ):
        look(replace(NODE, gpu_memory=40.0))
    with pytest.raises(
        Broken,
        match="more than this machine's 128: use more nodes, "
        "or OFFLOAD=False if the GPUs allow it$",
    ):
        look(replace(NODE, memory=128.0))


def test_a_model_without_a_plan():
    outcome = memory.compare(None, "some/moe", NODE)
    assert outcome.status == "skipped" and outcome.message.startswith(
        "there is no plan for some/moe with this engine: "
    )


ON_CPU = replace(
    RUN, cpu=True, gpus_per_node=2, offload_parameters=False, offload_optimizer=False, prompts=4,
    mini_batch=4,
    tokens_per_gpu=None, log_prob_tokens_per_gpu=None, micro_batch=1, log_prob_micro_batch=1,
    rollout_tp=2,
)  # fmt: skip


def test_on_a_cpu_the_host_counts():
    needed = make_plan(ON_CPU, SHAPE, 0).peak()[1] / GIB
    # 7.6 B parameters: 16 bytes of each in the trainer, 4 in the server and 4 + 4 where weights are
    # sent; and moments.
    assert 170 < needed < 200
    what = f"estimated: {needed:.1f} GiB of this machine's 1000.0"
    assert look(NODE, ON_CPU) == ("ok", f"{what}, 900.0 free")
    assert look(replace(NODE, memory_free=100.0), ON_CPU) == (
        "warn", f"{what}, of which 100.0 are free: end other processes first",
    )  # fmt: skip
    with pytest.raises(
        Broken,
        match="^estimated: Qwen2.5-Math-7B does not fit: update needs .* GiB per node .* of 64.0: ",
    ):
        look(replace(NODE, memory=64.0), ON_CPU)


PLAN = make_plan(RUN, SHAPE)
CONTENTS = ["model", "optimizer", "extra"]


def test_bytes_of_a_checkpoint():
    parameters, moments = SHAPE.parameters(), 8 * SHAPE.vocab * SHAPE.hidden
    assert disk.checkpoint_bytes(PLAN, CONTENTS) == 14 * parameters + moments
    assert disk.checkpoint_bytes(PLAN, ["model"]) == 2 * parameters + moments
    assert disk.checkpoint_bytes(PLAN, ["model", "hf_model", "extra"]) == 4 * parameters + moments
    half = replace(PLAN, run=replace(RUN, capo={**RUN.capo, "moments_dtype": "bfloat16"}))
    assert disk.checkpoint_bytes(half, CONTENTS) == 14 * parameters + moments // 2
    assert (
        disk.checkpoint_bytes(replace(PLAN, run=replace(RUN, capo=None)), CONTENTS)
        == 14 * parameters
    )


@pytest.mark.parametrize(
    ("layout", "engine"),
    [(Layout(distributed_optimizer=True), "megatron"), (FsdpLayout("fsdp2"), "fsdp2")],
    ids=["megatron", "fsdp2"],
)  # fmt: skip
def test_a_real_checkpoint_is_as_large_as_estimated(layout, engine, tmp_path):
    from capo_verl.plugin.checks.model_shape import find_shape

    model = make_tiny_qwen2(tmp_path / "model", vocab_size=4096, hidden_size=256)
    checkpoint = tmp_path / "checkpoint"
    run_on_ranks(save_and_go_on, 1, layout, model, str(checkpoint))
    written = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    shape = find_shape(model)
    run = RunSpec(
        engine=engine, cpu=True, response_length=64, prompt_length=64, capo=verl_knobs("grpo")
    )
    estimated = disk.checkpoint_bytes(make_plan(run, shape, 0), CONTENTS)
    assert written == pytest.approx(estimated, rel=0.03)


def config(folder: Path, save_freq=10, keep=None, steps=52):
    trainer = {
        "default_local_dir": str(folder), "save_freq": save_freq, "max_actor_ckpt_to_keep": keep,
        "total_training_steps": steps,
    }  # fmt: skip
    actor = {"checkpoint": {"save_contents": CONTENTS}}
    return OmegaConf.create({"trainer": trainer, "actor_rollout_ref": {"actor": actor}})


@pytest.mark.parametrize(
    ("save_freq", "keep", "steps", "count"),
    [
        (10, None, 52, 6),
        (10, 3, 52, 3),
        (10, 1, 52, 2),
        (60, 1, 52, 1),
        (10, None, None, None),
        (10, 2, None, 2),
    ],
)
def test_checkpoints_at_once(save_freq, keep, steps, count):
    assert disk.checkpoints(config(Path("x"), save_freq, keep, steps)) == count


@pytest.fixture
def free(monkeypatch):
    """Sets what ``shutil.disk_usage`` says is free, in GiB, and lists the folders that were asked
    about.
    """
    asked = []

    def choose(gib):
        usage = namedtuple("usage", "total used free")(2000 * GIB, 0, int(gib * GIB))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
        return asked

    return choose


def test_room_for_all_checkpoints(free, tmp_path):
    asked = free(1000)
    outcome = disk.compare(PLAN, config(tmp_path / "not" / "yet"), True)
    assert asked == [tmp_path]
    assert (outcome.status, outcome.message) == (
        "ok", f"estimated: 103 GiB a checkpoint, 6 at once, 1000.0 GiB are free at {tmp_path}",
    )  # fmt: skip


def test_room_for_some(free, tmp_path):
    free(300)
    outcome = disk.compare(PLAN, config(tmp_path), True)
    assert (outcome.status, outcome.message) == (
        "warn",
        f"estimated: 103 GiB a checkpoint, 6 at once, but 300.0 GiB are free at {tmp_path}: free "
        "some, set OUTPUT_DIR to a larger disk, or MAX_CKPT_TO_KEEP",
    )
    assert disk.compare(PLAN, config(tmp_path, keep=2), True).status == "ok"


def test_no_disk(free, tmp_path):
    free(0)
    message = (
        f"estimated: 103 GiB a checkpoint, 6 at once, but 0.0 GiB are free at {tmp_path}: free "
        "some, or set OUTPUT_DIR to a larger disk"
    )
    with pytest.raises(Broken) as refused:
        disk.compare(PLAN, config(tmp_path), True)
    assert str(refused.value) == message
    outcome = disk.compare(PLAN, config(tmp_path), False)  # the run will be elsewhere
    assert (outcome.status, outcome.message) == ("warn", message)


def test_nothing_to_write(free, tmp_path):
    free(0)
    outcome = disk.compare(PLAN, config(tmp_path, save_freq=-1), True)
    assert (outcome.status, outcome.message) == (
        "ok",
        "no checkpoints are written (trainer.save_freq; SAVE_FREQ=N writes one every N steps)",
    )  # fmt: skip


def test_what_cannot_be_judged(free, tmp_path):
    free(7)
    outcome = disk.compare(
        PLAN,
        OmegaConf.merge(config(tmp_path), {"trainer": {"default_local_dir": "hdfs://x/y"}}),
        True,
    )
    assert (outcome.status, outcome.message) == (
        "skipped",
        "hdfs://x/y is not on a file system: look there yourself",
    )
    outcome = disk.compare(None, config(tmp_path), True)
    assert (outcome.status, outcome.message) == (
        "skipped", f"7.0 GiB are free at {tmp_path}; the size of a checkpoint of this model is not "
        "known",
    )  # fmt: skip


def test_a_folder_of_somebody_else(free, tmp_path, monkeypatch):
    free(1000)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(Broken) as refused:
        disk.compare(PLAN, config(tmp_path / "run"), True)
    assert (
        str(refused.value)
        == f"{tmp_path} cannot be written to: set OUTPUT_DIR to a folder of yours"
    )
