# SPDX-License-Identifier: Apache-2.0
"""The check of the switches: what it composes is what a run composes."""

from __future__ import annotations

import pytest

pytest.importorskip("verl")

from capo_verl.commands.doctor import switch
from capo_verl.launch.dry_run import compose


def test_files_that_are_read_once_give_the_same_configurations():
    switches = ("+capo=grpo", "+rival=spo", "+capo=kl_budget", "+capo=grpo")
    with switch._files_read_once() as compose_one:
        found = [compose_one([*switch.BASE, name]) for name in switches]
    assert found[0] == found[3] != found[2]
    assert found[1:] == [compose([*switch.BASE, name]) for name in switches[1:]]
