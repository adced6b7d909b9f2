# SPDX-License-Identifier: Apache-2.0
"""Every launcher's dry run with every value of its switches, and what the launchers promise to
Slurm.
"""

from __future__ import annotations

import math
import re
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from capo_verl.config import PRESETS
from capo_verl.launch import dry_run as dry_run_module
from capo_verl.launch import plan
from capo_verl.launch.dry_run import compose, dry_run
from capo_verl.plugin import state
from capo_verl.plugin.checks import files, model_shape, run_spec
from tests.launch.launchers import CPU, EXAMPLES, GPU, ROOT, SWITCH, call, command_line

SIZES = {
    "run_qwen2_5_math_7b_megatron.sh": "7.62 B",
    "run_qwen2_5_32b_megatron.sh": "32.76 B",
    "run_qwen3_8b_megatron.sh": "8.19 B",
    "run_qwen3_30b_a3b_megatron.sh": "30.53 B",
}
REGIMES = {"conservative": (3e-6, 1152, 52), "aggressive": (1.5e-5, 96, 100)}
"""Learning rate, completions per step, steps: the paper's, written down a second time on purpose.
"""


@pytest.fixture
def platform(monkeypatch):
    """Selects the platform as the launchers do."""

    def choose(cpu):
        if cpu:
            monkeypatch.setenv("VERL_PLATFORM", "cpu")
        else:
            import verl  # noqa: F401  it chose its platform for this process when it was first imported

            for name in ("VERL_PLATFORM", *files.OFFLINE):
                monkeypatch.delenv(name, raising=False)
        assert state.on_cpu() == cpu

    return choose


def value(config, path):
    return OmegaConf.select(config, path)


def check_switch(config, capo):
    """The preset's own settings, or plain GRPO's, and no other."""
    if capo == "off" or not PRESETS[capo].verl:
        expected = PRESETS["grpo"].verl
    else:
        expected = OmegaConf.to_container(
            OmegaConf.create({"verl": PRESETS[capo].verl, "data": config.data}), resolve=True
        )["verl"]
    assert {path: value(config, path) for path in expected} == expected
    knobs = value(config, "actor_rollout_ref.actor.policy_loss.capo")
    assert (knobs and knobs.preset) == (None if capo == "off" else capo)


@pytest.mark.parametrize("capo", SWITCH)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("script", GPU)
def test_dry_runs_for_gpus(script, regime, capo, tmp_path, platform, caplog):
    module, *overrides = command_line(script, tmp_path, CAPO=capo, REGIME=regime, DRY_RUN=1)
    assert module == "capo_verl.launch.dry_run"
    platform(cpu=False)
    printed, notes = dry_run(overrides)
    config = OmegaConf.create(yaml.safe_load(printed))
    check_switch(config, capo)
    assert not caplog.records  # nothing on the command line contradicts a preset
    rate, completions, steps = REGIMES[regime]
    optim = config.actor_rollout_ref.actor.optim
    assert optim.lr == rate
    assert (optim.lr_decay_style, optim.lr_warmup_steps_ratio, optim.lr_warmup_steps) == (
        "cosine",
        0.1,
        -1,
    )
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == completions
    assert config.actor_rollout_ref.rollout.n == 8
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == config.data.train_batch_size
    assert config.actor_rollout_ref.actor.ppo_epochs == 1
    assert config.trainer.total_training_steps == steps
    assert (config.data.max_prompt_length, config.data.max_response_length) == (512, 1024)
    assert config.actor_rollout_ref.rollout.temperature == 1.0
    assert not config.actor_rollout_ref.actor.use_kl_loss and not config.algorithm.use_kl_in_reward
    assert optim.use_checkpoint_opt_param_scheduler is True
    assert f", {SIZES[script]} parameters" in printed
    assert ("CAPO moments" in printed) == (capo not in ("off", "kl_budget"))
    assert len(notes) == 2 and all("parquet does not exist" in note for note in notes)


@pytest.mark.parametrize("capo", SWITCH)
@pytest.mark.parametrize("script", CPU)
def test_dry_runs_for_cpus(script, capo, tmp_path, tiny_model, platform, caplog):
    _, *overrides = command_line(script, tmp_path, CAPO=capo, MODEL_PATH=tiny_model, DRY_RUN=1)
    platform(cpu=True)
    printed, notes = dry_run(overrides)
    config = OmegaConf.create(yaml.safe_load(printed))
    check_switch(config, capo)
    assert not caplog.records
    assert (
        f"# Plan: {tiny_model.name}, 0.00 B parameters, 1 node(s) x 2 ranks, TP2 PP1 CP1 DP1"
        in printed
    )
    assert len(notes) == 2


def test_one_process_prints_all_and_starts_nothing(tmp_path, tiny_model):
    variables = {"MODEL_PATH": tiny_model, "CAPO": "grpo", "DRY_RUN": 1, "PYTHON": sys.executable}
    done = call("run_quickstart_cpu.sh", tmp_path, "trainer.total_training_steps=77", **variables)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["trainer"]["total_training_steps"] == 77  # the command line comes last
    assert config["actor_rollout_ref"]["actor"]["policy_loss"]["capo"]["policy_shift_max"] == 1e-4
    assert f"# Plan: {tiny_model.name}, " in done.stdout
    assert not (tmp_path / "run").exists()
    refused = call(
        "run_quickstart_cpu.sh",
        tmp_path,
        "actor_rollout_ref.actor.optim.learning_rate=1",
        **variables,
    )
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.splitlines()[-1].startswith(
        "capo_verl: refused before start: Could not override"
    )


def test_dry_run_of_a_gpu_launcher_as_a_process(tmp_path):
    done = call("run_qwen2_5_math_7b_megatron.sh", tmp_path, DRY_RUN=1, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert (
        "# Plan: Qwen2.5-Math-7B, 7.62 B parameters, 1 node(s) x 8 GPUs, TP2 PP1 CP1 DP4"
        in done.stdout
    )
    refused = call(
        "run_qwen2_5_math_7b_megatron.sh",
        tmp_path,
        DRY_RUN=1,
        PYTHON=sys.executable,
        GPU_MEMORY_GIB=40,
    )
    assert refused.returncode == 2
    assert "Qwen2.5-Math-7B does not fit: " in refused.stderr.splitlines()[-1]


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A strict plan of the 7B model, on a machine whose ``nvidia-smi`` does what is given."""
    overrides = command_line("run_qwen2_5_math_7b_megatron.sh", tmp_path, DRY_RUN="strict")[1:]

    def plan(script=None, strict=True, **variables):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").unlink(missing_ok=True)
        if script is not None:
            (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
            (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setenv("DRY_RUN", "strict" if strict else "1")
        for name in ("GPU_MEMORY_GIB", "CAPO_PLAN", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        return dry_run_module.plan(compose(overrides))

    return plan


TWO_SIZES = (
    "[ \"$*\" = '--query-gpu=memory.total --format=csv,noheader,nounits' ] && printf "
    "'143771\\n81559\\n'"
)


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        ({}, "79.6"),
        ({"script": "printf '143771\\n'"}, "140.4"),
        ({"script": TWO_SIZES}, "79.6"),
        ({"script": TWO_SIZES.replace("81559", "97871")}, "95.6"),
        (
            {
                "script": "[ \"${4-all}\" = 0,2 ] && printf '143771\\n'",
                "CUDA_VISIBLE_DEVICES": "0,2",
            },
            "140.4",
        ),
        ({"script": "printf '143771\\n'", "strict": False}, "79.6"),
        ({"script": "printf '143771\\n'", "GPU_MEMORY_GIB": "94.5"}, "94.5"),
    ],
    ids=str,
)
def test_a_strict_dry_run_plans_for_the_gpus_of_this_machine(gpus, platform, arguments, memory):
    platform(cpu=False)
    table, notes = gpus(**arguments)
    assert table.splitlines()[-3].endswith(f" + 6 reserved, of {memory}") and notes == []


@pytest.mark.parametrize("visible", ["MIG-1", "MIG-GPU-1/1/0", "0,MIG-1"])
@pytest.mark.parametrize(
    ("script", "memory"), [("printf '143771\\n'", "140.4"), ("exit 9", "79.6"), (None, "79.6")]
)
def test_the_memory_of_a_slice_is_not_known(gpus, platform, visible, script, memory):
    platform(cpu=False)
    table, notes = gpus(script, CUDA_VISIBLE_DEVICES=visible)
    assert table.splitlines()[-3].endswith(f", of {memory}")
    assert notes == [
        f"CUDA_VISIBLE_DEVICES={visible} is a slice of a GPU, whose memory is not known: planned "
        f"for a whole GPU of {memory} GiB; GPU_MEMORY_GIB sets it"
    ]


def test_a_slice_is_not_noted_where_its_memory_is_given(gpus, platform):
    platform(cpu=False)
    assert gpus(CUDA_VISIBLE_DEVICES="MIG-1", GPU_MEMORY_GIB="70")[1] == []


@pytest.mark.parametrize("script", ["exit 9", "echo '[N/A]'", "true"])
def test_an_nvidia_smi_that_tells_nothing_is_a_note(gpus, platform, script):
    platform(cpu=False)
    table, (note,) = gpus(script)
    assert table.splitlines()[-3].endswith(", of 79.6") and note.startswith(
        "nvidia-smi did not tell the GPUs' memory ("
    )
    assert "planned for 79.6 GiB; GPU_MEMORY_GIB sets it" in note and "\n" not in note


def test_what_does_not_fit_is_refused_or_noted(gpus, platform):
    platform(cpu=False)
    with pytest.raises(ValueError, match="Qwen2.5-Math-7B does not fit: .* of 34.0: "):
        gpus("printf '40960\\n'")
    for variables, message in (
        ({"GPU_MEMORY_GIB": "40"}, "Qwen2.5-Math-7B does not fit: "),
        ({"GPU_MEMORY_GIB": "20"}, "leaves room for 0 tokens of KV cache"),
    ):
        table, (note,) = gpus(CAPO_PLAN="note", **variables)
        assert message in note and f"of {variables['GPU_MEMORY_GIB']}.0" in table.splitlines()[-3]
    for variables, message in (
        ({"CAPO_PLAN": "ignore"}, "CAPO_PLAN=ignore: choose one of refuse, note"),
        ({"GPU_MEMORY_GIB": "80GB"}, "GPU_MEMORY_GIB=80GB: set it to the GiB of one GPU"),
        ({"GPU_MEMORY_GIB": "-1"}, "GPU_MEMORY_GIB=-1: set it to the GiB of one GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            gpus(**variables)


def test_a_strict_dry_run_looks_at_the_data(tmp_path, tiny_model, platform, monkeypatch):
    _, *overrides = command_line(
        "run_quickstart_cpu.sh", tmp_path, MODEL_PATH=tiny_model, DRY_RUN="strict"
    )
    platform(cpu=True)
    monkeypatch.setenv("DRY_RUN", "strict")
    with pytest.raises(ValueError, match="data/train.parquet does not exist"):
        dry_run(overrides)
    refused = call("run_quickstart_cpu.sh", tmp_path, MODEL_PATH="m", DRY_RUN="yes")
    assert refused.returncode == 2 and "DRY_RUN=yes: choose one of 1, strict, 0" in refused.stderr


@pytest.mark.parametrize("script", [*GPU, *CPU])
def test_seed(script, tmp_path):
    keys = ("data.seed", "actor_rollout_ref.rollout.seed")
    given = settings(command_line(script, tmp_path, MODEL_PATH="m", SEED=7)[1:])
    assert [given[key] for key in keys] == ["7", "7"]
    assert not set(keys) & set(settings(command_line(script, tmp_path, MODEL_PATH="m")[1:]))


@pytest.mark.parametrize("script", [*GPU, *CPU])
def test_switch(script, tmp_path):
    def arguments(*more, **variables):
        return command_line(script, tmp_path, *more, MODEL_PATH="m", **variables)

    assert [a for a in arguments(CAPO="reinforce") if "capo=" in a] == ["+capo=reinforce"]
    # The same on the command line, alone or twice.
    for variables in ({}, {"CAPO": "reinforce"}):
        given = arguments("+capo=reinforce", **variables)
        assert [a for a in given if "capo=" in a] == ["+capo=reinforce"]
        assert not any(a.startswith("algorithm.adv_estimator") for a in given)
    assert not any("capo=" in a for a in arguments())
    for switch, message in (
        ("ppo", "CAPO=ppo: choose one of "),
        ("dr_grpo", "CAPO=dr_grpo and +capo=grpo contradict"),
    ):
        refused = call(
            script,
            tmp_path,
            "+capo=grpo" if switch == "dr_grpo" else "x=1",
            CAPO=switch,
            MODEL_PATH="m",
        )
        assert (
            refused.returncode == 2
            and message in refused.stderr
            and refused.stderr.count("\n") == 1
        )
    assert all(
        name in call(script, tmp_path, CAPO="ppo", MODEL_PATH="m").stderr
        for name in [*PRESETS, "off"]
    )


def settings(overrides):
    """Overrides as a mapping; the last one counts."""
    return dict(o.split("=", 1) for o in overrides if "=" in o)


@pytest.mark.parametrize("script", [*GPU, *CPU])
def test_checkpoints_and_nodes(script, tmp_path):
    def given(**variables):
        return settings(command_line(script, tmp_path, MODEL_PATH="m", **variables)[1:])

    on_gpu = script in GPU
    default = given()
    assert default["trainer.save_freq"] == ("10" if on_gpu else "-1")
    assert default["trainer.resume_mode"] == ("auto" if on_gpu else "disable")
    assert default["trainer.default_local_dir"] == f"'{tmp_path}/run/checkpoints'"
    assert default["trainer.max_actor_ckpt_to_keep"] == "null"
    assert default["actor_rollout_ref.actor.optim.use_checkpoint_opt_param_scheduler"] == "True"
    often = given(SAVE_FREQ=1, MAX_CKPT_TO_KEEP=2)
    assert (often["trainer.save_freq"], often["trainer.resume_mode"]) == ("1", "auto")
    assert often["trainer.max_actor_ckpt_to_keep"] == "2"
    assert given(RESUME_MODE="disable", SAVE_FREQ=1)["trainer.resume_mode"] == "disable"
    two = given(SLURM_JOB_NUM_NODES=2)
    ranks = "8" if on_gpu else "1"
    assert (two["trainer.nnodes"], two["trainer.n_gpus_per_node"]) == ("2", ranks)
    assert given(SLURM_JOB_NUM_NODES=2, NNODES=1)["trainer.nnodes"] == "1"
    here = (
        ROOT if script == "run_smollm2_135m_cpu.sh" else tmp_path
    )  # it goes to the repository for its requirements
    assert given(OUTPUT_DIR="here")["trainer.default_local_dir"] == f"'{here}/here/checkpoints'"


@pytest.mark.parametrize("script", CPU)
def test_ranks_that_do_not_divide_over_nodes_are_refused(script, tmp_path):
    for variables, message in (
        ({"NNODES": 3}, "NPROCS=2 ranks cannot be spread evenly over NNODES=3"),
        ({"NNODES": "two"}, "NNODES=two: set it to the number of nodes"),
        ({"NGPUS_PER_NODE": 3}, "NGPUS_PER_NODE=3 times NNODES=1 is not NPROCS=2"),
    ):
        refused = call(script, tmp_path, MODEL_PATH="m", **variables)
        assert (
            refused.returncode == 2
            and message in refused.stderr
            and refused.stderr.count("\n") == 1
        )


def test_fsdp_has_no_megatron_settings(tmp_path):
    given = settings(
        command_line("run_quickstart_cpu.sh", tmp_path, MODEL_PATH="m", MODEL_ENGINE="dp")[1:]
    )
    assert not any("megatron" in key or "opt_param_scheduler" in key for key in given)


@pytest.mark.parametrize("script", [*GPU, *CPU])
def test_an_existing_cluster_is_joined(script, tmp_path):
    """ray.init refuses numbers of CPUs and GPUs then; the workers' environment is the cluster's, so
    ours is sent along.
    """
    alone = settings(command_line(script, tmp_path, MODEL_PATH="m")[1:])
    joined = settings(
        command_line(
            script, tmp_path, MODEL_PATH="m", RAY_ADDRESS="head:6379", OUTPUT_DIR=tmp_path / "it's"
        )[1:]
    )
    assert not any("env_vars" in key for key in alone)
    assert ("+ray_kwargs.ray_init.num_gpus" in alone) == (script in CPU)
    assert not any(re.search(r"num_cpus|num_gpus|include_dashboard", key) for key in joined)
    sent = {key.rsplit(".", 1)[1]: text for key, text in joined.items() if "env_vars" in key}
    config = compose(
        [f"+ray_kwargs.ray_init.runtime_env.env_vars.{key}={text}" for key, text in sent.items()]
    )
    received = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert f"{tmp_path}/it's/metrics.jsonl" == received.VERL_FILE_LOGGER_PATH
    expected = (
        {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
        if script in CPU
        else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    )
    assert {key: received[key] for key in expected} == expected
    assert all(isinstance(text, str) for text in received.values())  # Ray takes nothing else


def test_every_attempt_gets_its_own_metrics(tmp_path):
    def path(**variables):
        given = command_line(
            "run_quickstart_cpu.sh", tmp_path, MODEL_PATH="m", RAY_ADDRESS="head:1", **variables
        )
        return settings(given)[
            "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH"
        ].strip("'")

    for expected in ("metrics.jsonl", "metrics.2.jsonl", "metrics.3.jsonl"):
        assert path() == f"{tmp_path}/run/{expected}"
        (tmp_path / "run" / expected).touch()
    assert path(VERL_FILE_LOGGER_PATH="/mine") == "/mine"
    for given, expected in (("of.a/mine.json", "of.a/mine.2.json"), ("of.a/mine", "of.a/mine.2")):
        (tmp_path / given).parent.mkdir(exist_ok=True)
        (tmp_path / given).touch()
        assert path(VERL_FILE_LOGGER_PATH=tmp_path / given) == f"{tmp_path}/{expected}"


@pytest.mark.parametrize("script", GPU)
def test_every_experiment_has_its_own_folder(script, tmp_path):
    def folder(*arguments, **variables):
        given = settings(command_line(script, tmp_path, *arguments, OUTPUT_DIR="", **variables)[1:])
        name = given["trainer.experiment_name"].strip("'")
        assert given["trainer.default_local_dir"] == f"'{tmp_path}/outputs/{name}/checkpoints'"
        assert given["hydra.run.dir"] == f"'{tmp_path}/outputs/{name}/hydra'"
        return name

    model = script.removeprefix("run_").removesuffix("_megatron.sh")
    assert folder() == f"{model}_off_conservative"
    assert (
        folder(CAPO="grpo")
        == folder("+capo=grpo")
        == folder("+capo=grpo", CAPO="grpo")
        == f"{model}_grpo_conservative"
    )
    assert folder(REGIME="aggressive", CAPO="track") == f"{model}_track_aggressive"
    assert folder(LOSS_MODE="gspo", SEED=3) == f"{model}_off_conservative_gspo_seed3"
    assert folder("+rival=dcpo", CAPO="kl_budget") == f"{model}_kl_budget_conservative_dcpo"
    assert folder(MODEL_PATH="/models/My Model-1.5/") == "my_model_1_5_off_conservative"
    assert folder(EXPERIMENT_NAME="mine", CAPO="grpo") == "mine"


@pytest.mark.parametrize("script", GPU)
def test_a_rival_brings_its_own_loss(script, tmp_path):
    config = compose(command_line(script, tmp_path, "+rival=lopti", "+capo=grpo")[1:])
    assert value(config, "actor_rollout_ref.actor.policy_loss.loss_mode") == "lopti"
    assert value(config, "actor_rollout_ref.actor.ppo_epochs") == 2
    refused = call(script, tmp_path, "+rival=lopti", LOSS_MODE="gspo")
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"{script}: LOSS_MODE=gspo and +rival=lopti contradict each other: drop one of them\n"
    )


@pytest.mark.parametrize("script", [*GPU, *CPU])
def test_paths_may_contain_anything(script, tmp_path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    odd = tmp_path / "it's [a]=\\'b, {c} \\"
    variables = {
        "OUTPUT_DIR": odd / "run", "DATA_DIR": odd, "MODEL_PATH": odd, "EXPERIMENT_NAME": "it's",
        "RAY_ADDRESS": "head:1",
    }  # fmt: skip
    overrides = command_line(script, tmp_path, **variables)[1:]
    received = {
        o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)
    }
    assert received["trainer.default_local_dir"] == f"{odd}/run/checkpoints"
    assert received["hydra.run.dir"] == f"{odd}/run/hydra"
    assert received["data.train_files"] == [f"{odd}/train.parquet"]
    assert received["data.val_files"] == [f"{odd}/test.parquet"]
    assert received["actor_rollout_ref.model.path"] == str(odd)
    assert received["trainer.experiment_name"] == "it's"
    metrics = received["ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH"]
    assert metrics == f"{odd}/run/metrics.jsonl"


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused = call(
        "run_quickstart_cpu.sh", tmp_path, MODEL_PATH="m", OUTPUT_DIR=tmp_path / "file/run"
    )
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "file/run cannot be written to: set it to a folder of yours" in refused.stderr


@pytest.mark.parametrize("script", GPU)
def test_choices_of_the_gpu_launchers(script, tmp_path, platform):
    for variables, message in (
        ({"REGIME": "bold"}, "REGIME=bold: choose one of conservative, aggressive"),
        ({"INFER_BACKEND": "triton"}, "INFER_BACKEND=triton: choose one of vllm, sglang, hf"),
    ):
        refused = call(script, tmp_path, **variables)
        assert (
            refused.returncode == 2
            and message in refused.stderr
            and refused.stderr.count("\n") == 1
        )
    for backend in ("vllm", "sglang"):
        given = settings(command_line(script, tmp_path, INFER_BACKEND=backend)[1:])
        assert given["actor_rollout_ref.rollout.name"] == backend
    given = settings(
        command_line(script, tmp_path, LOSS_MODE="gspo", ACTOR_LR="1e-7", NNODES=4)[1:]
    )
    assert given["actor_rollout_ref.actor.policy_loss.loss_mode"] == "gspo"
    assert given["actor_rollout_ref.actor.optim.lr"] == "1e-7"
    assert given["trainer.nnodes"] == "4"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"INFER_BACKEND": "sglang"}, "INFER_BACKEND=sglang: choose one of hf, vllm"),
        (
            {"INFER_BACKEND": "vllm", "ROLLOUT_KV_CACHE_MIB": "64M"},
            "ROLLOUT_KV_CACHE_MIB=64M: set it to a number of MiB",
        ),
    ],
)
def test_rollouts_of_the_cpu_launchers(tmp_path, variables, message):
    refused = call("run_quickstart_cpu.sh", tmp_path, MODEL_PATH="m", **variables)
    assert (refused.returncode, refused.stderr) == (2, f"run_quickstart_cpu.sh: {message}\n")


def test_a_gpu_launcher_can_be_tried_on_a_cpu(tmp_path, tiny_model, platform):
    variables = {"INFER_BACKEND": "hf", "NGPUS_PER_NODE": 2, "MODEL_PATH": tiny_model,
        "MAX_RESPONSE_LENGTH": 64,
                 "MAX_PROMPT_LENGTH": 64}  # fmt: skip
    _, *overrides = command_line("run_qwen2_5_math_7b_megatron.sh", tmp_path, **variables)
    platform(cpu=True)
    printed, _ = dry_run(overrides)
    rollout = yaml.safe_load(printed)["actor_rollout_ref"]["rollout"]
    assert (rollout["name"], rollout["tensor_model_parallel_size"]) == ("hf", 2)


def header_rows(script):
    """The table of layouts in a launcher's header: variables that choose the layout, and the line
    itself.
    """
    text = (EXAMPLES / script).read_text()
    names = ("NNODES", "NGPUS_PER_NODE", "ACTOR_TP", "ACTOR_PP", "ROLLOUT_TP")
    for line in re.findall(r"^#   +\d+ x \d.*$", text, flags=re.M):
        yield dict(zip(names, re.findall(r"\d+", line)[:5], strict=True)), line


def header_row(variables, overrides):
    """The line as it should be."""
    run = run_spec.from_config(compose(overrides), cpu=False)
    made = plan.make_plan(run, model_shape.find_shape(run.model))
    totals = [sum(parts.values()) / plan.GIB for parts in made.phases.values()]
    moments = made.phases["update"]["CAPO moments"] / plan.GIB
    nodes, gpus, tp, pp, rollout_tp = variables.values()
    cells = "".join(f"{total:9.1f}" for total in totals)
    return (
        f"#   {nodes} x {gpus:<3} {tp:>3} {pp:>3} {rollout_tp:>8}  "
        f"{cells}{moments:9.1f}{made.host / plan.GIB:7.0f}{made.kv_tokens // 1000:9,}"
    )


@pytest.mark.parametrize("script", GPU)
def test_headers_say_what_the_plan_computes(script, tmp_path):
    """And docs/plan.md says what the headers do."""
    rows = list(header_rows(script))
    assert len(rows) >= 3
    documented = (ROOT / "docs/plan.md").read_text()
    for variables, line in rows:
        nodes, _, gpus, tp, pp, *figures, tokens = line.split()[1:]
        cells = [f"{nodes} × {gpus}", f"{tp}, {pp}", *figures, f"{tokens},000"]
        assert f"| {' | '.join(cells)} |" in documented
        _, *overrides = command_line(
            script, tmp_path, CAPO="grpo", REGIME="conservative", **variables
        )
        assert line == header_row(variables, overrides)
    default = settings(command_line(script, tmp_path)[1:])
    first = rows[0][0]
    assert [first["NNODES"], first["NGPUS_PER_NODE"], first["ACTOR_TP"], first["ROLLOUT_TP"]] == [
        default["trainer.nnodes"], default["trainer.n_gpus_per_node"],
        default["actor_rollout_ref.actor.megatron.tensor_model_parallel_size"],
        default["actor_rollout_ref.rollout.tensor_model_parallel_size"],
    ]  # fmt: skip


def test_warm_up_is_a_tenth_of_the_steps(tmp_path):
    """As verl computes it (``verl/utils/megatron/optimizer.py:246``)."""
    from types import SimpleNamespace

    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.megatron.optimizer import get_megatron_optimizer_param_scheduler

    _, *overrides = command_line("run_qwen2_5_math_7b_megatron.sh", tmp_path, REGIME="aggressive")
    config = compose(overrides)
    config.actor_rollout_ref.actor.optim.total_training_steps = config.trainer.total_training_steps
    optim = omega_conf_to_dataclass(config.actor_rollout_ref.actor.optim)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = get_megatron_optimizer_param_scheduler(optimizer, optim)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    assert rates[:11] == pytest.approx([1.5e-6 * step for step in range(11)])
    assert rates[55] == pytest.approx(1.5e-5 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
