# SPDX-License-Identifier: Apache-2.0
"""The checks, in the order in which they are made and reported."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capo_verl.commands.doctor import driver, kernels, software, workers
from capo_verl.commands.doctor.check import SKIPPED, Check, Outcome, Result, perform
from capo_verl.plugin.stack import Report

if TYPE_CHECKING:
    from capo_verl.commands.doctor.example import Example

INSTALL = "scripts/check_stack.py says what to install"


@dataclass(frozen=True)
class Options:
    """Choices of the command line."""

    kernels: bool = True
    ray: bool = True
    ray_address: str | None = None
    """Address of a Ray that runs; None starts one."""
    example: Path | None = None
    overrides: Sequence[str] = ()


def examine(
    options: Options, reports: Sequence[Report], tell: Callable[[Result], None]
) -> list[Result]:
    """Make all checks.

    Args:
        reports: of the stacks (``capo_verl.plugin.stack``).
        tell: is given each result as it is found.
    """
    results = []
    with ExitStack() as running:
        for check in _checks(options, reports, running):
            results.append(perform(check))
            tell(results[-1])
    return results


def _checks(options: Options, reports: Sequence[Report], running: ExitStack) -> list[Check]:
    # The slowest works beside the others; with more of them Ray might not start in the time that it
    # gives itself.
    asking = running.enter_context(workers.start(options.ray_address)) if options.ray else None
    return [
        Check("software stack", lambda: software.compare(reports), INSTALL),
        Check("plugin installed", driver.plugin, INSTALL),
        Check("registered with verl", driver.hooks, INSTALL),
        Check("Megatron engine", lambda: driver.engine("megatron"), INSTALL),
        Check("FSDP engine", lambda: driver.engine("fsdp", "fsdp2"), INSTALL),
        Check("switch composes", _switch, INSTALL),
        Check(
            "kernels",
            lambda: (
                kernels.judge(running.enter_context(kernels.start()))
                if options.kernels
                else _left_out("--no-kernels", "the kernels compile or run")
            ),
            INSTALL,
        ),
        Check(
            "Ray worker",
            lambda: (
                workers.judge(asking, options.ray_address, driver.seen()["versions"])
                if asking
                else _left_out("--no-ray", "workers load the plugin")
            ),
            "leave it out with --no-ray",
        ),
        *_of_example(options),
    ]


# What follows imports the plugin, so only after ``driver.seen()``: the question is whether verl
# does.


def _switch() -> Outcome:
    from capo_verl.commands.doctor.switch import switch

    return switch()


def _left_out(option: str, question: str) -> Outcome:
    return Outcome(SKIPPED, f"{option}: leave that out to see whether {question}")


def _of_example(options: Options) -> list[Check]:
    if options.example is None:
        advice = Outcome(
            SKIPPED,
            "--example examples/run_....sh looks at a launcher's configuration, memory and disk",
        )
        return [Check("example", lambda: advice, "")]

    @functools.cache
    def example() -> Example:
        from capo_verl.commands.doctor.example import Example
        from capo_verl.commands.doctor.machine import look

        assert options.example is not None
        return Example(options.example, options.overrides, look())

    def if_resolved(look: Callable[[], Outcome]) -> Callable[[], Outcome]:
        refused = Outcome(SKIPPED, "the example's dry run is refused: repair that first")
        return lambda: look() if example().resolves else refused

    return [
        Check("example", lambda: example().look(), "try it with DRY_RUN=1"),
        Check(
            "memory", if_resolved(lambda: example().memory()), "docs/plan.md says what is estimated"
        ),
        Check("disk", if_resolved(lambda: example().disk()), "set OUTPUT_DIR to a folder of yours"),
    ]
