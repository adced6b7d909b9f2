# SPDX-License-Identifier: Apache-2.0
"""What stops a run in the driver, in one line, and what must not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from capo_verl.launch.dry_run import compose
from capo_verl.plugin.checks import files
from capo_verl.plugin.checks.names import check_names
from capo_verl.plugin.checks.sizes import check_sizes
from tests.launch.launchers import ROOT, call
from tests.plugin.checks.verl_rows import write_splits

MODEL = "actor_rollout_ref.model.path"


@pytest.fixture
def data(tmp_path):
    """Two parquet files in verl's schema, eight prompts each."""
    return write_splits(tmp_path)


@pytest.fixture
def run(data, tiny_model):
    """verl's configuration for a run that could start, with overrides."""

    def make(*overrides):
        return compose([
            "model_engine=megatron", "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.rollout.name=hf",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2", "trainer.n_gpus_per_node=2",
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2",
            "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            f"data.train_files={data}/train.parquet", f"data.val_files=[{data}/test.parquet]",
            f"{MODEL}={tiny_model}", f"trainer.default_local_dir={data}/checkpoints", *overrides,
        ])  # fmt: skip

    return make


def check(config):
    check_names(config)
    check_sizes(config)
    files.check_files(config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{MODEL}=hdfs://somewhere/model"],
        ["data.train_files=hdfs://somewhere/train.parquet"],
        ["data.train_files=/no/files/*.parquet"],
        ["data.train_files=/no/file", "data.custom_cls.path=pkg://somewhere"],
        ["trainer.save_freq=1"],
        ["trainer.save_freq=-1", "trainer.default_local_dir=/proc/nowhere"],
        [
            "actor_rollout_ref.actor.policy_loss.loss_mode=mine",
            "actor_rollout_ref.model.external_lib=mine",
        ],
        ["actor_rollout_ref.actor.policy_loss.loss_mode=capo"],
    ],
    ids=str,
)
def test_accepted(run, overrides):
    check(run(*overrides))


def test_a_name_on_the_hub_is_accepted_where_the_hub_may_be_asked(run, monkeypatch):
    for name in files.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    check(run(f"{MODEL}=somebody/some-model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError,
        match="some-model is neither a folder nor in Hugging Face's cache, and HF_HUB_OFFLINE",
    ):
        check(run(f"{MODEL}=somebody/some-model"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{MODEL}=/no/model"], f"{MODEL}=/no/model does not exist: set it to"),
        ([f"{MODEL}=./no/model"], f"{MODEL}=./no/model does not exist"),
        ([f"{MODEL}=a/b/c"], f"{MODEL}=a/b/c does not exist"),
        ([f"{MODEL}={ROOT}"], "has no config.json: set it to a model's folder"),
        (["data.train_files=/no/train.parquet"], "data.train_files=/no/train.parquet does not "
        "exist: set it to a parquet"),
        (["data.val_files=[/no/test.parquet]"], "data.val_files=/no/test.parquet does not exist"),
        ([f"data.val_files={__file__}"], "is neither .parquet, .json nor .jsonl"),
        (["data.prompt_key=question"], "lacks the column 'question' .it has data_source, "
        "prompt, .*: prepare it anew, or set data.prompt_key"),
        (
            ["data.train_batch_size=9", "actor_rollout_ref.actor.ppo_mini_batch_size=9"],
            "data.train_files have 8 prompts, less than one data.train_batch_size=9",
        ),
        (["data.train_max_samples=4"], "data.train_files have 4 prompts"),
        (["data.val_files=[]"], "data.val_files have no rows: give some"),
        (["trainer.save_freq=1", "trainer.default_local_dir=/proc/nowhere"], "/proc/nowhere cannot "
        "be written to .No such"),
        (["trainer.resume_mode=resume_path"], "trainer.resume_from_path=None: set it to the folder "
        "global_step_N"),
        (["trainer.resume_mode=maybe"], "trainer.resume_mode=maybe: choose one of auto, disable, "
        "resume_path"),
        (["actor_rollout_ref.rollout.name=nothing"], "rollout.name=nothing: choose one of hf, "
        "sglang, trtllm, vllm"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=mine"], "loss_mode=mine: choose one of "
        ".*bypass_mode, capo, cispo"),
        (["actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3"], "2 GPUs do not divide "
        "by"),
        (
            ["trainer.n_gpus_per_node=8",
                "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=8"],
            "4 attention heads, which do not divide by",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refused(run, overrides, message):
    with pytest.raises(ValueError, match=message) as refused:
        check(run(*overrides))
    assert "\n" not in str(refused.value)


def test_an_unreadable_file_is_refused(run, data):
    (data / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="train.parquet cannot be read .*Parquet"):
        check(run())


def test_the_rollout_server_for_cpus_needs_them(run, monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM")
    with pytest.raises(
        ValueError, match="rollout.name=hf runs on CPUs only: set VERL_PLATFORM=cpu"
    ):
        check(run())


@pytest.mark.parametrize(
    "variable", [{"CAPO_PREFLIGHT": "0"}, {"RAY_ADDRESS": "ray://elsewhere:10001"}], ids=str
)
def test_files_of_another_machine_are_not_judged(run, monkeypatch, variable):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    check(run(f"{MODEL}=/no/model", "data.train_files=/no/train.parquet"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MODEL_PATH": "/no/model"}, "actor_rollout_ref.model.path=/no/model does not exist"),
        ({"DATA_DIR": "/no/data"}, "data.train_files=/no/data/train.parquet does not exist"),
        ({"ACTOR_TP": 3}, "4 attention heads, which do not divide by"),
    ],
    ids=str,
)
def test_a_refused_run_ends_at_once_with_one_line(data, tiny_model, tmp_path, variables, message):
    """Through verl's own main_ppo: no Ray, no traceback, nothing of Hydra's."""
    variables = {"MODEL_PATH": tiny_model, "DATA_DIR": data, "PYTHON": sys.executable, **variables}
    done = call("run_quickstart_cpu.sh", tmp_path, "data.train_batch_size=8", **variables)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "Platform override" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("capo_verl: refused before start: ") and message in lines[0]
    assert done.stdout == ""


def test_what_verl_refuses_itself_is_one_line_too(data, tiny_model, tmp_path):
    variables = {"MODEL_PATH": tiny_model, "DATA_DIR": data, "PYTHON": sys.executable}
    done = call(
        "run_quickstart_cpu.sh", tmp_path, "actor_rollout_ref.rollout.temperature=0", **variables
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "capo_verl: refused before start: validation gen temperature should"
    )
    assert "Traceback" not in done.stderr


def test_a_worker_of_ray_raises_instead(run):
    """verl's legacy trainer validates in a Ray actor, where only an exception reaches the
    driver.
    """
    program = (
        "from verl.utils.config import validate_config;import ray; ray.is_initialized = lambda: "
        "True;from capo_verl.launch.dry_run import "
        "compose;validate_config(compose(['trainer.resume_mode=maybe', "
        "'actor_rollout_ref.rollout.name=hf']), False, False)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: trainer.resume_mode=maybe: choose one of "
    )
