# SPDX-License-Identifier: Apache-2.0
"""What is looked at in a process, and what is made of it: in the driver and on the nodes of a
cluster.
"""

from __future__ import annotations

import copy
import json

import pytest

from capo_verl.commands.doctor import registration, workers
from capo_verl.commands.doctor.answering_process import AnsweringProcess
from capo_verl.commands.doctor.check import Broken
from capo_verl.plugin import register

ALL = {"verl", "torch", "capo-verl", "megatron-core", "Python"}


@pytest.fixture(scope="module")
def seen():
    return registration.look()


def test_here_everything_is_registered(seen):
    assert registration.problems(seen) == []
    assert json.loads(json.dumps(seen)) == seen
    assert set(seen["versions"]) == ALL and all(seen["versions"].values())


def test_every_module_that_the_plugin_waits_for_is_imported(seen, monkeypatch):
    import sys

    waited_for = []
    monkeypatch.setattr(register, "_when_imported", lambda module, *_: waited_for.append(module))
    register.register()
    assert len(waited_for) > 10
    assert [
        module for module in waited_for if module.startswith("verl.") and module not in sys.modules
    ] == []


MISSING = {"error": "AssertionError: Unknown backend: megatron"}
NO_BRIDGE = {
    "name": "capo_verl.engines.megatron.engine.CapoMegatronEngineWithLMHead",
    "ours": True,
    "bridge_error": "ModuleNotFoundError: No module named 'transformer_engine'",
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"errors": {"verl": "ModuleNotFoundError: No module named 'verl'"}},
            "verl cannot be imported (ModuleNotFoundError: No module named 'verl'): "
            "scripts/check_stack.py says what to install",
        ),
        (
            {"entry_points": [], "loaded": False},
            "no entry point of group verl.plugins names capo_verl.plugin.register: install the "
            "package there (pip install .)",
        ),
        (
            {"loaded": False, "errors": {"capo_verl.plugin.register": "ImportError: of wrapt"}},
            "capo_verl.plugin.register cannot be imported (ImportError: of wrapt): repair that, "
            "then try again",
        ),
        (
            {"errors": {"verl.trainer.ppo.v1.trainer_sync": "ImportError: of transfer_queue"}},
            "verl.trainer.ppo.v1.trainer_sync cannot be imported (ImportError: of transfer_queue): "
            "scripts/check_stack.py says what to install",
        ),
        (
            {"engines": {"megatron": MISSING}},
            "verl has no megatron engine here (AssertionError: Unknown backend: megatron): install "
            "Megatron-Core (scripts/check_stack.py)",
        ),
        (
            {"engines": {"megatron": NO_BRIDGE}},
            "Megatron-Bridge, which reads and writes the weights, cannot be imported "
            "(ModuleNotFoundError: No module named 'transformer_engine'): scripts/check_stack.py "
            "--stack gpu says what to install; VERL_PLATFORM=cpu runs without GPUs",
        ),
    ],
)  # fmt: skip
def test_each_problem_is_one_sentence(seen, changes, problem):
    assert registration.problems({**copy.deepcopy(seen), **changes}) == [problem]


@pytest.mark.parametrize(("vanilla", "module"), [(None, "bridge"), (True, "mbridge")])
def test_the_bridge_of_a_configuration_is_imported(vanilla, module, monkeypatch):
    """As on a GPU, by verl's own engine."""
    import sys

    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    monkeypatch.setattr(EngineRegistry, "get_engine_cls", lambda *_: MegatronEngineWithLMHead)
    monkeypatch.setitem(sys.modules, f"verl.models.mcore.{module}", None)
    error = registration.bridge_error(vanilla)
    assert error.startswith("ModuleNotFoundError: ") and f"verl.models.mcore.{module}" in error


def test_on_a_cpu_the_bridge_is_what_is_installed():
    assert registration.bridge_error() == registration.bridge_error(True) == ""


class Answer:
    """A child that has answered, or failed."""

    def __init__(self, nodes=None, failure=None):
        self._nodes, self._failure = nodes, failure

    def answer(self, timeout):
        if self._failure:
            raise Broken(self._failure)
        return self._nodes


def test_nodes_of_a_cluster(seen):
    here = seen["versions"]
    good = {"seen": seen}
    outcome = workers.judge(Answer({"a": good, "b": good}), "head:6379", here)
    engines = (
        "capo_verl.cpu.megatron.engine.CpuMegatronEngine and "
        "capo_verl.cpu.fsdp.engine.CpuFsdpEngine"
    )
    assert (outcome.status, outcome.message) == (
        "ok", f"workers on 2 nodes of the Ray at head:6379: policy loss 'capo', {engines}",
    )  # fmt: skip
    other = {"seen": {**seen, "versions": {**here, "verl": "0.9.0", "megatron-core": None}}}
    outcome = workers.judge(Answer({"a": good, "b": other}), "head:6379", here)
    assert (outcome.status, outcome.message) == (
        "warn",
        f"node b has verl 0.9.0 (here {here['verl']}), megatron-core missing (here "
        f"{here['megatron-core']}): install the same versions on every node",
    )
    lacking = {"seen": {**seen, "entry_points": [], "loaded": False}}
    with pytest.raises(Broken) as refused:
        workers.judge(
            Answer({"a": good, "b": lacking, "c": {"error": "no answer within 180 s"}}),
            "head:6379",
            here,
        )
    assert str(refused.value) == (
        "on 2 of 3 nodes, first b: no entry point of group verl.plugins names "
        "capo_verl.plugin.register: install the package there (pip install .)"
    )


def test_nobody_answers(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    with workers.start("127.0.0.1:9") as child, pytest.raises(Broken) as refused:
        workers.judge(child, "127.0.0.1:9", {})
    assert str(refused.value) == (
        "the Ray at 127.0.0.1:9 could not be asked: nobody answers there (Connection refused) "
        "(exit code 1); check that it runs "
        "and is Ray's head, or unset RAY_ADDRESS, or leave this check out with --no-ray"
    )


@pytest.fixture
def module(tmp_path):
    """Writes a module and gives the environment in which it is found."""

    def write(code):
        (tmp_path / "asked.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path)}

    return write


def test_a_child_answers_with_its_last_line(module):
    with AnsweringProcess(
        "asked",
        "7",
        environment=module("import sys; print('noise'); print('{\"n\": ' + sys.argv[1] + '}')"),
    ) as child:
        assert child.answer(60) == {"n": 7}


def test_a_child_that_crashes_or_hangs(module):
    crash = "import os, sys; print('about to crash', file=sys.stderr, flush=True); os.abort()"
    with (
        AnsweringProcess("asked", environment=module(crash)) as child,
        pytest.raises(Broken, match="^about to crash .exit code -6.$"),
    ):
        child.answer(60)
    hang = (
        "import sys, time; print('waiting', file=sys.stderr, flush=True); print(1, flush=True); "
        "time.sleep(600)"
    )
    with AnsweringProcess("asked", environment=module(hang)) as child:
        while not child._said():
            pass
        with pytest.raises(Broken, match=r"^no answer within 0.1 s \(it said last: waiting\)$"):
            child.answer(0.1)
        assert child._process.returncode == -15
