# SPDX-License-Identifier: Apache-2.0
"""The wheel in an environment of its own, from an empty folder: no checkout in reach."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from tests.packaging.test_distributions import ASSETS, project


def test_the_package_is_the_wheels(installed):
    done = installed.run(
        "-c",
        "import capo_verl, hydra_plugins.capo_verl_search_path as p; print(capo_verl.__file__, "
        "p.__file__)",
    )
    assert done.stdout.split() == [
        str(installed.site_packages / "capo_verl" / "__init__.py"),
        str(installed.site_packages / "hydra_plugins" / "capo_verl_search_path.py"),
    ]


def test_command_and_module_say_the_version(installed):
    version = project()["version"]
    for command in (["capo-verl"], ["-m", "capo_verl.commands"]):
        done = installed.run(*command, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"capo-verl {version}\n", "")


def test_help_names_every_command(installed):
    done = installed.run("capo-verl", "--help")
    assert done.returncode == 0
    for command in (
        "doctor", "quickstart", "data", "plan", "evaluate", "calibrate", "plot", "report",
    ):  # fmt: skip
        assert f"\n    {command} " in done.stdout
        assert installed.run("capo-verl", command, "--help").returncode == 0


FILTER = """
import json, torch
from capo_verl import CapoConfig, CapoFilter
config = CapoConfig(
    optimizer_model="sgd", top_k=None, policy_shift_max=1e-3, objective_shift_max=0.1
)
capo = CapoFilter(config, vocab_size=2, hidden_size=1)
double = dict(dtype=torch.float64)
hidden, logits = torch.tensor([[[1.0], [3.0]]], **double), torch.zeros(1, 2, 2, **double)
actions, mask = torch.tensor([[0, 1]]), torch.ones(1, 2)
out = capo.evaluate(hidden, logits, actions, torch.tensor([[1.0, 1.0]], **double), mask, 0.05)
print(json.dumps([out.objective_shift.tolist(), out.policy_shift.tolist(), out.accepted.tolist()]))
"""


def test_the_filter_computes(installed):
    """Logits 0 and A = 1: the direction of row r is u_r = h (1[r = a] - 1/2), so d = h (u_a - mean
    of u) = h^2 / 2, m_H = lr d and m_F = (lr d)^2 / 2. For h = 1, 3: d = 0.5, 4.5.
    """
    done = installed.run("-c", FILTER)
    assert done.returncode == 0, done.stderr
    objective, policy, accepted = json.loads(done.stdout)
    assert objective[0] == pytest.approx([0.025, 0.225], rel=1e-12)
    assert policy[0] == pytest.approx([3.125e-4, 2.53125e-2], rel=1e-12)
    assert accepted == [[True, False]]


COMPOSE = """
import json
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    for overrides in (["+capo=grpo"], ["+rival=spo"]):
        config = compose("ppo_trainer", overrides=["model_engine=megatron", *overrides])
        loss = config.actor_rollout_ref.actor.policy_loss
        print("composed", json.dumps([loss["_target_"], loss.loss_mode, *(
            [loss.capo.preset, loss.capo.policy_shift_max]
            if "capo" in loss
            else [loss.rival.name, loss.rival.epsilon]
        )]))
import verl, sys
from verl.trainer.ppo.core_algos import get_policy_loss_fn
file = sys.modules["capo_verl.plugin.register"].__file__
print("composed", json.dumps([get_policy_loss_fn("capo").__module__, file]))
"""


def test_verl_finds_switch_and_plugin(installed):
    done = installed.run("-c", COMPOSE, VERL_PLATFORM="cpu")
    assert done.returncode == 0, done.stderr
    found = [
        json.loads(line.removeprefix("composed "))
        for line in done.stdout.splitlines()
        if line.startswith("composed ")
    ]
    target = "capo_verl.plugin.policy_loss.CapoPolicyLossConfig"
    assert found == [
        [target, "vanilla", "grpo", 1e-4],
        [target, "spo", "spo", 0.2],
        [
            "capo_verl.plugin.losses",
            str(installed.site_packages / "capo_verl" / "plugin" / "register.py"),
        ],
    ]


def test_report_brings_its_assets(installed, tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        "".join(
            json.dumps({"step": i, "data": {"critic/score/mean": 0.5}}) + "\n" for i in range(3)
        )
    )
    done = installed.run("capo-verl", "report", log, "--output", tmp_path / "report.html")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report.html").read_text()
    for name in (name for name in ASSETS if name.endswith(".js")):
        script = (installed.site_packages / "capo_verl" / "viewer" / "assets" / name).read_text()
        assert script.strip().splitlines()[-1] in page, name


CHECKOUT_ONLY = {
    "quickstart": (
        ["capo-verl", "quickstart"], "examples/run_quickstart_cpu.sh is missing: install a "
        "checkout of the repository in place"
    ),
}  # fmt: skip
"""What needs files of the repository that no wheel holds: command, and the sentence it ends with.
"""


@pytest.mark.parametrize("name", CHECKOUT_ONLY)
def test_what_needs_a_checkout_says_so(name, installed):
    command, sentence = CHECKOUT_ONLY[name]
    done = installed.run(*command)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 2 and len(lines) == 1 and sentence in lines[0], (
        done.stdout + done.stderr
    )


def test_help_needs_no_checkout(installed):
    assert installed.run("-m", "capo_verl.cpu.smollm2", "--help").returncode == 0


def test_stack_reads_the_wheels_metadata(installed):
    code = (
        "from capo_verl.plugin import stack; print(stack.declared('cpu')[0]); "
        "print(*stack.declared('cpu')[1], sep='\\n')"
    )
    done = installed.run("-c", code)
    python, *requirements = done.stdout.splitlines()
    assert set(python.split(",")) == {">=3.10", "<3.13"}
    verl = importlib.metadata.version("verl")
    assert any(line.startswith(f"verl=={verl}") for line in requirements), done.stdout + done.stderr
