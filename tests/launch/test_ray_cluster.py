# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from capo_verl.launch.ray_cluster import NotReady, problems, tail, wait_for


class Clock:
    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def test_waits_until_every_node_is_there_with_its_gpus():
    clock, said = Clock(), []
    seen = iter([{}, {"a": 8}, {"a": 8, "b": 0}, {"a": 8, "b": 8}])
    wait_for(lambda: next(seen), ["a", "b"], 8, 10, said.append, clock.now, clock.sleep)
    assert clock.time == 3.0
    assert said == ["a joined with 8 GPUs (1 of 2 nodes)", "b joined with 0 GPUs (2 of 2 nodes)"]


def test_says_what_is_missing_after_the_time_limit():
    clock = Clock()
    with pytest.raises(NotReady) as error:
        wait_for(
            lambda: {"a": 8, "b": 7, "stranger": 8},
            ["a", "b", "c"],
            8,
            5,
            lambda line: None,
            clock.now,
            clock.sleep,
        )
    assert (
        str(error.value)
        == "after 5 s: node b joined with 7 GPUs, 8 expected; node c has not joined Ray"
    )
    assert error.value.nodes == ["b", "c"]
    assert clock.time == 5.0


def test_problems_of_a_node_that_died_after_joining():
    assert problems({"a": 1}, ["a", "b"], 1) == {"b": "has not joined Ray"}
    assert problems({"a": 1, "b": 1}, ["a", "b"], 1) == {}


def test_tail(tmp_path):
    log = tmp_path / "log"
    assert "No such file" in tail(log)
    log.write_text("")
    assert tail(log) == "    (empty)"
    log.write_text("1\n2\n3\n")
    assert tail(log, 2) == "    2\n    3"
