# SPDX-License-Identifier: Apache-2.0
"""Memory of the example, as ``capo_verl.launch.plan`` estimates it, against this machine's."""

from __future__ import annotations

from capo_verl.commands.doctor.check import OK, SKIPPED, WARN, Broken, Outcome
from capo_verl.commands.doctor.machine import Machine
from capo_verl.launch.plan import GIB, Plan


def compare(plan: Plan | None, model: str, here: Machine) -> Outcome:
    """
    Args:
        plan: of the example; None if the sizes of its ``model`` are not known.

    Raises:
        Broken: if it cannot fit here.
    """
    if plan is None:
        return Outcome(
            SKIPPED,
            f"there is no plan for {model} with this engine: `capo-verl plan` takes the sizes of "
            "dense models as arguments",
        )
    return _on_cpu(plan, here) if plan.run.cpu else _on_gpus(plan, here)


def _on_cpu(plan: Plan, here: Machine) -> Outcome:
    misfit = plan.misfit()
    if misfit:
        raise Broken(f"estimated: {misfit}")
    needed = plan.peak()[1] / GIB
    what = f"estimated: {needed:.1f} GiB of this machine's {here.memory:.1f}"
    if needed > here.memory_free:
        return Outcome(
            WARN, f"{what}, of which {here.memory_free:.1f} are free: end other processes first"
        )
    return Outcome(OK, f"{what}, {here.memory_free:.1f} free")


def _on_gpus(plan: Plan, here: Machine) -> Outcome:
    run, (phase, peak) = plan.run, plan.peak()
    needed, host = peak / GIB + plan.reserve, plan.host / GIB
    misfit = plan.misfit()
    what = (
        f"estimated: {needed:.1f} GiB per GPU ({phase}, with {plan.reserve:.0f} in reserve) of "
        f"{here.gpu_memory:.1f}, and {host:.0f} GiB of host memory per node"
    )
    if not here.gpus:
        verdict = (
            f" (planned for {here.gpu_memory:.1f} GiB it does not fit: {misfit})" if misfit else ""
        )
        return Outcome(
            SKIPPED,
            f"no GPU here to compare with, {what}{verdict}: run the doctor where the run will be, "
            "or set GPU_MEMORY_GIB",
        )
    if run.gpus_per_node > here.gpus:
        raise Broken(
            f"{run.gpus_per_node} GPUs per node are asked for, {here.gpus} are here: set "
            f"NGPUS_PER_NODE={here.gpus} (trainer.n_gpus_per_node), or use other nodes"
        )
    if misfit:
        raise Broken(f"estimated: {misfit}")
    if host > here.memory:
        raise Broken(
            f"{what}, more than this machine's {here.memory:.0f}: use more nodes, or OFFLOAD=False "
            "if the GPUs allow it"
        )
    if host > here.memory_free:
        return Outcome(
            WARN,
            f"{what}, of whose {here.memory:.0f} only {here.memory_free:.0f} are free: end other "
            "processes first",
        )
    if here.gpu_free is not None and needed > here.gpu_free:
        return Outcome(
            WARN,
            f"{what}, but only {here.gpu_free:.1f} are free on one of the GPUs: end what else runs "
            "there first",
        )
    return Outcome(OK, what)
