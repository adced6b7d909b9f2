# SPDX-License-Identifier: Apache-2.0
"""Router replay without anybody who says which experts to take is refused before a run."""

from __future__ import annotations

import pytest

from capo_verl.launch.dry_run import composing
from capo_verl.plugin.checks.before_start import check_config
from capo_verl.plugin.checks.router_replay import BYPASS, MODE, RETURNED, check_router_replay
from tests.launch.launchers import CPU, command_line

EXPERTS, DENSE = "Qwen/Qwen3-30B-A3B", "Qwen/Qwen2.5-7B"


@pytest.fixture(scope="module")
def compose():
    with composing() as compose_one:
        yield compose_one


@pytest.fixture
def configure(tmp_path, compose):
    def make(*overrides: str, model: str = EXPERTS, **variables: str):
        _, *given = command_line(CPU[0], tmp_path, *overrides, MODEL_PATH=model, **variables)
        return compose([override for override in given if not override.startswith("hydra.")])

    return make


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        (DENSE, ()),
        (EXPERTS, (f"{RETURNED}=True",)),  # for verl's metrics of the routers
        (EXPERTS, (f"{MODE}=R2",)),
        (EXPERTS, (f"{MODE}=R3", f"{RETURNED}=True", f"{BYPASS}=True")),
    ],
    ids=str,
)
def test_what_passes(configure, model, overrides):
    check_router_replay(configure(*overrides, model=model))


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (EXPERTS, (f"{MODE}=R3",), rf"mode=R3 takes the experts .* set {RETURNED}=True"),
        (
            EXPERTS, (f"{MODE}=R2", f"{RETURNED}=True"),
            rf"mode=R2 records the experts itself: set it to R3, or {RETURNED}=False",
        ),
        (
            EXPERTS, (f"{MODE}=R2", f"{BYPASS}=True"),
            rf"mode=R2 records .*, which {BYPASS}=True leaves out: set it to R3, or bypass_mode",
        ),
        (DENSE, (f"{MODE}=R2",), "mode=R2: Qwen2.5-7B has no experts; set it to disabled"),
        (DENSE, (f"{RETURNED}=True",), "replay=True: Qwen2.5-7B has no experts; set .* False"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(configure, model, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_config(configure(*overrides, model=model))


def test_other_engines_have_no_routers_to_replay(configure):
    check_router_replay(configure(model=DENSE, MODEL_ENGINE="dp"))
