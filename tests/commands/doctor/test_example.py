# SPDX-License-Identifier: Apache-2.0
"""A launcher's dry run, and what is read off it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from capo_verl.commands.doctor import checks, driver, machine
from capo_verl.commands.doctor.check import Broken, perform
from capo_verl.commands.doctor.example import Example
from tests.commands.doctor.command import doctor, rows
from tests.helpers import warm
from tests.helpers.tiny_inputs import make_inputs
from tests.plugin.checks.verl_rows import write_splits

EXAMPLES = Path(__file__).parents[3] / "examples"
QUICKSTART = EXAMPLES / "run_quickstart_cpu.sh"
HERE = machine.Machine(gpus=0, gpu_memory=79.6, gpu_free=None, memory=24.0, memory_free=20.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and data that the launcher's reward takes."""
    return write_splits(make_inputs(tmp_path_factory.mktemp("inputs")), 16)


@pytest.fixture
def environment(monkeypatch, inputs, tmp_path):
    for name in ("CAPO", "DRY_RUN", "NNODES", "RAY_ADDRESS", "SAVE_FREQ", "GPU_MEMORY_GIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "executable", warm.python())  # for the dry runs
    values = {"DATA_DIR": inputs, "MODEL_PATH": inputs / "model", "OUTPUT_DIR": tmp_path / "run"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_it_resolves(environment, tmp_path):
    example = Example(QUICKSTART, ["+capo=grpo"], HERE)
    outcome = example.look()
    assert (outcome.status, outcome.message) == (
        "ok",
        "run_quickstart_cpu.sh resolves with +capo=grpo",
    )
    assert example.config.trainer.default_local_dir == str(tmp_path / "run/checkpoints")
    assert (example.run.cpu, example.run.world, example.run.tp) == (True, 2, 2)
    assert example.plan.shape.layers == 2 and example.plan.memory == 24.0
    assert not (tmp_path / "run").exists()  # looked at only


@pytest.mark.parametrize(("vanilla", "asked"), [("False", [False]), ("True", [True])])
def test_the_bridge_that_it_would_take_is_imported(vanilla, asked, environment):
    seen = []
    environment.setattr(driver, "bridge_problem", lambda v: seen.append(v) or "it is missing")
    key = "actor_rollout_ref.actor.megatron.vanilla_mbridge"
    with pytest.raises(Broken, match="^run_quickstart_cpu.sh resolves, but it is missing$"):
        Example(QUICKSTART, [f"{key}={vanilla}"], HERE).look()
    assert seen == asked


def test_missing_data_is_a_warning(environment, tmp_path):
    environment.setenv("DATA_DIR", str(tmp_path))
    outcome = Example(QUICKSTART, [], HERE).look()
    assert outcome.status == "warn"
    assert outcome.message == (
        "run_quickstart_cpu.sh resolves, without +capo, but would not start here: "
        f"data.train_files={tmp_path}/train.parquet does "
        "not exist: set it to a parquet file in verl's schema (and 1 more: DRY_RUN=1 tells)"
    )


def test_a_run_that_does_not_fit_still_resolves(environment):
    """Whether it fits is another check's question."""
    small = machine.Machine(gpus=0, gpu_memory=79.6, gpu_free=None, memory=1.0, memory_free=1.0)
    environment.setattr("capo_verl.launch.dry_run.machine_memory", lambda: 1.0)
    example = Example(QUICKSTART, [], small)
    assert example.look().status == "ok" and example.plan.misfit() is not None


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        (
            {"MODEL_PATH": ""},
            [],
            "set DATA_DIR and MODEL_PATH: 'capo-verl quickstart --prepare-only' prints them",
        ),
        (
            {},
            ["+capo=nothing"],
            "CAPO=nothing: choose one of grpo, dr_grpo, reinforce, soft, kl_budget, track, off",
        ),
        ({}, ["trainer.no_such_key=1"], "Could not override 'trainer.no_such_key'"),
    ],
)
def test_a_refused_dry_run_says_why(environment, variables, overrides, message):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(Broken) as refused:
        Example(QUICKSTART, overrides, HERE).look()
    assert str(refused.value).startswith("the dry run is refused: ") and message in str(
        refused.value
    )


def test_the_command_reports_all_three(environment, tmp_path):
    arguments = (
        "--json",
        "--no-ray",
        "--no-kernels",
        "--example",
        str(QUICKSTART),
        "+capo=kl_budget",
        "trainer.save_freq=20",
    )
    done = doctor(*arguments)
    assert done.returncode == 0, done.stdout
    found = rows(done)
    assert found["example"] == ("ok", "run_quickstart_cpu.sh resolves with +capo=kl_budget")
    assert found["memory"][1].startswith("estimated: 4.3 GiB of this machine's ")
    assert found["disk"][0] == "ok" and " GiB a checkpoint, 3 at once, " in found["disk"][1]


def results(*overrides):
    """Of the three checks, made in this process."""
    made = checks._of_example(checks.Options(example=QUICKSTART, overrides=overrides))
    return {
        check.name: (result.status, result.message) for check in made for result in [perform(check)]
    }


def test_no_disk(environment, tmp_path):
    environment.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    found = results("trainer.save_freq=20")
    assert [found[name][0] for name in ("example", "memory", "disk")] == [
        "ok",
        found["memory"][0],
        "FAIL",
    ]
    assert found["disk"][1].endswith(
        f"but 0.0 GiB are free at {tmp_path}: free some, or set OUTPUT_DIR to a larger disk"
    )


def test_nothing_is_estimated_for_what_is_refused(environment):
    found = results("trainer.n_gpus_per_node=3")
    assert found["example"][0] == "FAIL" and "trainer.n_gpus_per_node=3" in found["example"][1]
    assert (
        found["memory"]
        == found["disk"]
        == ("skipped", "the example's dry run is refused: repair that first")
    )
