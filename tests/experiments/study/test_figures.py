# SPDX-License-Identifier: Apache-2.0
"""Who looks how in the studies' figures."""

from __future__ import annotations

import pandas as pd

from capo_verl.experiments.study.figures import CONTROL, styles


def look(*methods: str, control: str = "grpo") -> dict[str, dict]:
    return styles(pd.DataFrame({"method": methods, "control": control}))


def test_a_method_looks_the_same_in_every_study() -> None:
    one = look("grpo", "capo", "soft", "kl_budget")
    other = look("random drop", "kl_budget", "grpo", "capo adaptive", "clip 0.2")
    assert one["kl_budget"] == other["kl_budget"] and one["grpo"] == other["grpo"]
    assert one["grpo"]["color"] == CONTROL


def test_no_two_methods_of_a_study_look_alike() -> None:
    shown = look("grpo", "kl_budget", *(f"other {i}" for i in range(20)))
    assert len({tuple(style.values()) for style in shown.values()}) == 22


def test_the_control_is_black_whatever_it_is() -> None:
    shown = look("kl_budget", "grpo", control="kl_budget")
    assert shown["kl_budget"]["color"] == CONTROL != shown["grpo"]["color"]
