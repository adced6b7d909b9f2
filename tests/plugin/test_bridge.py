# SPDX-License-Identifier: Apache-2.0
"""Which bridge a run takes, and the refusal of one that is not installed."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from capo_verl.plugin import bridge
from capo_verl.plugin.checks import before_start

ACTOR, REF, _ = bridge.KEYS


@pytest.mark.parametrize(
    ("vanilla", "cpu", "lacking", "expected"),
    [
        (False, False, "", True),
        (False, False, "megatron.bridge", True),  # verl itself says what is missing
        (True, False, "", False),
        (False, True, "", True),
        (False, True, "megatron.bridge", False),
        (True, True, "", False),
    ],
)
def test_the_setting_chooses_and_a_cpu_takes_what_is_there(
    monkeypatch, vanilla, cpu, lacking, expected
) -> None:
    monkeypatch.setattr(bridge, "lacking", lambda: lacking)
    assert bridge.is_megatron_bridge(vanilla, cpu) is expected


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (("megatron.bridge", "modelopt"), ""),
        (("modelopt",), "megatron.bridge"),
        (("megatron.bridge",), "modelopt"),
    ],
)
def test_what_is_lacking_is_named(monkeypatch, installed, expected) -> None:
    monkeypatch.setattr(bridge.importlib.util, "find_spec", lambda name: name in installed or None)
    assert bridge.lacking() == expected


@pytest.fixture
def check(monkeypatch):
    """The start-up checks of a command line, as Hydra hands it over."""

    def checked(*overrides: str, lacking: str = "megatron.bridge", platform: str = "cpu") -> None:
        monkeypatch.setenv("VERL_PLATFORM", platform)
        monkeypatch.setattr(bridge, "lacking", lambda: lacking)
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer", ["model_engine=megatron", *overrides], return_hydra_config=True
            )
        HydraConfig.instance().set_config(config)
        before_start.before_start(config)

    monkeypatch.setattr(before_start, "check_config", lambda config: None)
    monkeypatch.setattr(before_start, "check_files", lambda config: [])
    yield checked
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("key", [ACTOR, REF])
def test_a_run_that_asks_for_what_is_not_installed_is_refused(check, key) -> None:
    with pytest.raises(ValueError) as refused:
        check(f"{key}=False")
    assert str(refused.value) == (
        f"{key}=False needs Megatron-Bridge (megatron.bridge is not installed): install it as "
        "scripts/gpu_stack.requirements.txt does, with Python 3.12, or set it to True, for mbridge"
    )


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        ([f"{ACTOR}=True"], {"lacking": ""}),
        ([f"{ACTOR}=True"], {"platform": "cuda"}),
        ([], {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [True, False])
def test_mbridge_is_not_told_to_pad(check, overrides, given, value) -> None:
    with pytest.raises(ValueError) as refused:
        check(*overrides, f"+{bridge.PADDING}={value}", **given)
    assert str(refused.value) == (
        f"{bridge.PADDING}={value} is Megatron-Bridge's, and mbridge runs: remove it"
    )


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        ([f"+{bridge.PADDING}=True"], {"lacking": ""}),
        ([f"+{bridge.PADDING}=True"], {"platform": "cuda"}),
        ([], {}),
        ([f"{ACTOR}=True"], {}),
        ([f"{ACTOR}=False"], {"lacking": ""}),
        ([f"{ACTOR}=False"], {"platform": "cuda"}),
        (["actor_rollout_ref.actor.megatron.seed=1"], {}),
    ],
    ids=str,
)
def test_others_are_not(check, overrides, given) -> None:
    check(*overrides, **given)
