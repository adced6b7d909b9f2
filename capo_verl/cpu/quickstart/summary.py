# SPDX-License-Identifier: Apache-2.0
"""A run in a few lines: the table at the end of the quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from capo_verl.cpu.quickstart.records import Record

LAST_STEPS = 5


def summarise(records: Sequence[Record], completions_per_step: int) -> list[tuple[str, str]]:
    """Rows of the table: what, and how much. Rows without data are left out."""
    steps = [r for r in records if r.step > 0]
    held_out = [r.held_out_accuracy for r in records if r.held_out_accuracy is not None]
    training = [r.train_accuracy for r in steps if r.train_accuracy is not None]
    rejected = [r.rejection_rate for r in steps if r.rejection_rate is not None]
    shift = [r.policy_shift for r in steps if r.policy_shift is not None]
    seconds = [r.seconds for r in steps if r.seconds is not None]
    share = [r.filter_share for r in steps if r.filter_share is not None]
    rows = [("completions", f"{len(steps) * completions_per_step:,} in {len(steps)} steps")]
    if held_out:
        rows.append(("held-out accuracy", f"{held_out[0]:.3f} -> {held_out[-1]:.3f}"))
    if training:
        rows.append(
            (f"training accuracy, last {LAST_STEPS} steps", f"{fmean(training[-LAST_STEPS:]):.3f}")
        )
    if rejected:
        rows.append(("rejected tokens", f"mean {fmean(rejected):.2%}, most {max(rejected):.2%}"))
    if shift:
        rows.append(("m_F per token", f"mean {fmean(shift):.1e}"))
    if seconds:
        rows.append(("seconds per step", f"median {median(seconds):.1f}"))
    if share:
        rows.append(("filter's share of the update", f"median {median(share):.1%}"))
    return rows
