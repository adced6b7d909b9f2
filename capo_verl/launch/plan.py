# SPDX-License-Identifier: Apache-2.0
"""Needs of a run, before it starts: memory per GPU in each phase, memory of the hosts, and
whether that fits.

An estimate from sizes alone (:mod:`capo_verl.launch.plan_memory`). What nobody can compute from
sizes, such as NCCL's buffers, the CUDA context and fragmentation, is one stated number,
``reserve``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capo_verl.core.memory import FilterMemory
from capo_verl.launch import plan_memory
from capo_verl.launch.hardware import H100_80GB, RESERVE
from capo_verl.plugin.checks import sizes
from capo_verl.plugin.checks.model_shape import ModelShape
from capo_verl.plugin.checks.run_spec import ROLLOUT, RunSpec

GIB = 1 << 30
CPU_PROCESSES, CPU_RANK = 3.3, 0.5
"""GiB of everything around a training on a CPU (driver, Ray, trainer, rewards, server), and of a
rank, without model and activations: the quickstart's, whose model takes 10 MiB, measured with two
ranks as the sum of PSS (4.3 GiB).
"""
CPU_VLLM, CPU_VLLM_RANK = 1.0, 0.5
"""GiB that a vLLM server and each of its ranks take beside weights and cache, measured alike."""


class PlanError(ValueError):
    """The run cannot work; the message names the numbers."""


@dataclass(frozen=True)
class Plan:
    """Bytes per rank, in the rank that needs most."""

    run: RunSpec
    shape: ModelShape
    memory: float
    """GiB of a GPU; on a CPU of the machine, if known (else 0)."""
    reserve: float
    phases: Mapping[str, Mapping[str, int]]
    """Phase -> what for -> bytes, on the fullest GPU; on a CPU one phase for a whole node."""
    host: int
    """Bytes per node for what is offloaded from its GPUs."""
    kv_tokens: int
    """Tokens for which a rollout replica has room; 0 on a CPU."""

    def peak(self) -> tuple[str, int]:
        """The fullest phase and its bytes."""
        return max(
            ((name, sum(parts.values())) for name, parts in self.phases.items()),
            key=lambda pair: pair[1],
        )

    def misfit(self) -> str | None:
        """Reason why the memory will not do, with the numbers; None if it will."""
        run, shape = self.run, self.shape
        needed = run.max_model_len or run.sequence_length
        if run.colocated and not run.cpu and self.kv_tokens < needed:
            return (
                f"{ROLLOUT}.gpu_memory_utilization={run.rollout_memory} of {self.memory:.1f} GiB "
                f"leaves room for {self.kv_tokens} tokens of KV cache "
                f"({plan_memory.kv_cache_per_token(run, shape)} bytes each) beside "
                f"{_gib(plan_memory.rollout_weights(run, shape)):.1f} GiB of weights, but a "
                f"sequence has {needed}: raise it or "
                f"{ROLLOUT}.tensor_model_parallel_size={run.rollout_tp}"
            )
        phase, peak = self.peak()
        limit = self.memory - self.reserve
        if self.memory and peak > limit * GIB:
            parts = ", ".join(
                f"{name} {_gib(size):.1f}" for name, size in self.phases[phase].items() if size
            )
            return (
                f"{shape.name} does not fit: {phase} needs {_gib(peak):.1f} GiB per "
                f"{'node' if run.cpu else 'GPU'} ({parts}) of {limit:.1f}: "
                f"{_advice(run, shape, phase)}"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints: GiB, two decimals."""
        name, peak = self.peak()
        run = self.run
        return {
            "model": self.shape.name,
            "parameters": self.shape.parameters(),
            "layout": {
                "nodes": run.nodes, "gpus_per_node": run.gpus_per_node, "tp": run.tp, "pp": run.pp,
                "cp": run.cp, "dp": run.dp, "rollout_tp": run.rollout_tp,
                **({"ep": run.ep, "etp": run.expert_tp} if self.shape.experts else {}),
            },
            "gib_per_gpu" if not run.cpu else "gib_per_node": {
                phase: {**{k: _gib(v) for k, v in parts.items() if v},
                    "total": _gib(sum(parts.values()))}
                for phase, parts in self.phases.items()
            },
            "peak": {"phase": name, "gib": _gib(peak), "of": self.memory, "reserve": self.reserve},
            "host_gib_per_node": _gib(self.host),
            "kv_cache_tokens": self.kv_tokens,
        }  # fmt: skip

    def table(self) -> str:
        """The plan as text for people."""
        run, where = self.run, "node" if self.run.cpu else "GPU"
        experts = f" EP{run.ep} ETP{run.expert_tp}" if self.shape.experts else ""
        head = (
            f"Plan: {self.shape.name}, {self.shape.parameters() / 1e9:.2f} B parameters, "
            f"{run.nodes} node(s) x {run.gpus_per_node} {'ranks' if run.cpu else 'GPUs'}, "
            f"TP{run.tp} PP{run.pp} CP{run.cp} DP{run.dp}{experts}, "
            f"rollout {run.rollout} TP{run.rollout_tp}"
        )
        digits = 2 if run.cpu else 1
        names = list(dict.fromkeys(part for parts in self.phases.values() for part in parts))
        rows = [[f"GiB per {where}", *self.phases]]
        for name in names:
            cells = [parts.get(name, 0) for parts in self.phases.values()]
            if any(cells):
                rows.append(
                    [name, *(f"{_gib(cell):.{digits}f}" if cell else "-" for cell in cells)]
                )
        rows.append(
            [
                "total",
                *(f"{_gib(sum(parts.values())):.{digits}f}" for parts in self.phases.values()),
            ]
        )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  "
            + row[0].ljust(widths[0])
            + "".join("  " + c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        phase, peak = self.peak()
        notes = [f"  peak: {phase}, {_gib(peak):.{digits}f} GiB"]
        if run.cpu:
            notes[0] += f", of {self.memory:.1f} on this machine" if self.memory else ""
        else:
            notes[0] += f" + {self.reserve:.0f} reserved, of {self.memory:.1f}"
            notes += [
                f"  host memory per node: {_gib(self.host):.0f} GiB for what is offloaded, besides "
                "the processes'",
                f"  KV cache of a rollout replica: {self.kv_tokens:,} tokens, "
                f"{self.kv_tokens // run.sequence_length:,} sequences of {run.sequence_length:,}",
            ]
        return "\n".join([head, *lines, *notes])


def make_plan(
    run: RunSpec,
    shape: ModelShape,
    memory: float = H100_80GB,
    reserve: float = RESERVE,
    must_fit: bool = True,
) -> Plan:
    """
    Args:
        memory: GiB of one GPU; on a CPU of the machine, 0 for unknown.
        reserve: GiB per GPU that the formulas do not count.
        must_fit: whether a plan that does not fit is an error; if not, ask :meth:`Plan.misfit`.

    Raises:
        PlanError: for sizes that do not divide or cannot fit.
    """
    found = sizes.problems(run, shape)
    if run.sequence_length > shape.max_positions > 0:
        found.append(
            f"data.max_prompt_length={run.prompt_length} + "
            f"data.max_response_length={run.response_length} = {run.sequence_length} tokens are "
            f"more than the {shape.max_positions} positions of {shape.name}: lower one"
        )
    if found:
        raise PlanError(found[0])
    plan = _on_cpu(run, shape, memory) if run.cpu else _on_gpu(run, shape, memory, reserve)
    misfit = plan.misfit() if must_fit else None
    if misfit:
        raise PlanError(misfit)
    return plan


def _advice(run: RunSpec, shape: ModelShape, phase: str) -> str:
    if run.cpu:
        return "use a smaller model or micro-batch, or another machine"
    if phase == "rollout":
        return (
            f"lower {ROLLOUT}.gpu_memory_utilization={run.rollout_memory}, or offload parameters "
            "and optimizer"
        )
    experts = f", expert (now {run.ep})" if shape.experts else ""
    return (
        f"raise the tensor (now {run.tp}){experts} or pipeline (now {run.pp}) parallel size, add "
        f"nodes (now {run.nodes}), or give a micro-batch fewer tokens"
    )


def _update(run: RunSpec, shape: ModelShape, stage: int) -> dict[str, int]:
    """The actor's update on one stage."""
    held, last = plan_memory.states(run, shape, stage), stage == run.pp - 1
    tokens = plan_memory.tokens_of_micro_batch(run)
    capo = plan_memory.capo_filter(run, shape) if last else FilterMemory(0, 0, 0)
    probe = plan_memory.kl_probe(run, shape, stage)
    return {
        "parameters": held.parameters + plan_memory.gathered_layer(run, shape),
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations": plan_memory.activations(run, shape, tokens, stage),
        "logits": plan_memory.logits(run, shape, tokens, update=True) if last else 0,
        "CAPO moments": capo.moments,
        "CAPO tokens": capo.tokens + capo.row_sums,
        "KL probe": probe.logits + probe.parameters,
    }


def _log_prob(run: RunSpec, shape: ModelShape, stage: int) -> dict[str, int]:
    """A forward pass: one layer's activations at a time; gradients and optimizer only if they are
    not offloaded.
    """
    update, last = _update(run, shape, stage), stage == run.pp - 1
    tokens = plan_memory.tokens_of_micro_batch(run, log_prob=True)
    return {
        **_resident(run, update),
        "parameters": update["parameters"],
        "activations": plan_memory.layer_activations(run, shape, tokens),
        "logits": plan_memory.logits(run, shape, tokens, update=False) if last else 0,
    }


def _resident(run: RunSpec, update: Mapping[str, int]) -> dict[str, int]:
    """State of the trainer that stays on the GPU while it does not train (``offload_megatron_*`` in
    verl/utils/megatron_utils.py).
    """
    return {
        "parameters": 0 if run.offload_parameters else update["parameters"],
        "gradients": 0 if run.offload_parameters else update["gradients"],
        "optimizer": 0 if run.offload_optimizer else update["optimizer"],
        "CAPO moments": 0 if run.offload_optimizer else update["CAPO moments"],
    }


def _fullest(candidates: list[dict[str, int]]) -> dict[str, int]:
    return max(candidates, key=lambda parts: sum(parts.values()))


def _on_gpu(run: RunSpec, shape: ModelShape, memory: float, reserve: float) -> Plan:
    stages = range(run.pp)
    updates = [_update(run, shape, stage) for stage in stages]
    weights = plan_memory.rollout_weights(run, shape)
    budget = int(run.rollout_memory * memory * GIB) if run.colocated else 0
    engine = (
        {"rollout weights": weights, "KV cache": max(budget - weights, 0)} if run.colocated else {}
    )
    asleep = {} if run.rollout_sleeps else engine
    sync = {"rollout weights": weights, "bucket": run.sync_bucket_bytes} if run.colocated else {}
    phases = {
        "rollout": _fullest([{**_resident(run, update), **engine} for update in updates]),
        "weight sync": _fullest(
            [
                {**_resident(run, u), "parameters": u["parameters"], **sync, **asleep}
                for u in updates
            ]
        ),
        "log-probs": _fullest([{**_log_prob(run, shape, stage), **asleep} for stage in stages]),
        "update": _fullest([{**update, **asleep} for update in updates]),
    }
    # The host's copies: parameters pinned once per buffer, the optimizer's state, the filter's
    # moments; gradients are dropped.
    host = max(
        run.offload_parameters * u["parameters"]
        + run.offload_optimizer * (u["optimizer"] + u["CAPO moments"])
        for u in updates
    )
    kv_tokens = engine.get("KV cache", 0) // plan_memory.kv_cache_per_token(run, shape)
    return Plan(run, shape, memory, reserve, phases, host * run.gpus_per_node, kv_tokens)


def _on_cpu(run: RunSpec, shape: ModelShape, memory: float) -> Plan:
    """Nothing is offloaded and nothing sleeps: ranks and servers share the machine's memory
    throughout.
    """
    fullest = _fullest([_update(run, shape, stage) for stage in range(run.pp)])
    per_node = {name: size * run.gpus_per_node for name, size in fullest.items()}
    servers = max(run.gpus_per_node // run.rollout_ranks, 1)
    completions = run.prompts * run.completions_per_prompt // max(run.world // run.rollout_ranks, 1)
    held = _vllm_on_cpu if run.rollout == "vllm" else _server_on_cpu
    for name, size in held(run, shape, completions).items():
        per_node[name] = servers * size
    per_node["processes"] += int((CPU_PROCESSES + CPU_RANK * run.gpus_per_node) * GIB)
    return Plan(run, shape, memory, 0, {"update": per_node}, 0, 0)


def _server_on_cpu(run: RunSpec, shape: ModelShape, completions: int) -> dict[str, int]:
    """Bytes of a server of this package: the model in float32, and the keys and values of the batch
    it generates (``capo_verl/cpu/rollout/sampling.py``).

    It receives the weights through Ray's object store, from copies of one bucket
    (``capo_verl/cpu/rollout/replica.py``).
    """
    server = RunSpec(cpu=True)
    weights = plan_memory.rollout_weights(server, shape)
    per_token = plan_memory.kv_cache_per_token(server, shape)
    return {
        "rollout weights": weights,
        "KV cache": completions * run.sequence_length * per_token,
        "weight sync": weights + min(weights, run.sync_bucket_bytes),
        "processes": 0,
    }


def _vllm_on_cpu(run: RunSpec, shape: ModelShape, completions: int) -> dict[str, int]:
    """Bytes of a vLLM server: each rank keeps its weights and what oneDNN packed of them
    (``capo_verl/cpu/rollout/vllm.py``), and a cache of the size that it is given.

    Weights reach it through one bucket in shared memory, and a copy of a rank's.
    """
    ranks, weights = run.rollout_ranks, plan_memory.rollout_weights(run, shape)
    needed = completions * run.sequence_length * plan_memory.kv_cache_per_token(run, shape)
    cache = needed if run.kv_cache_bytes is None else run.kv_cache_bytes
    bucket = min(plan_memory.rollout_weights(RunSpec(cpu=True), shape), run.sync_bucket_bytes)
    return {
        "rollout weights": ranks * 2 * weights,
        "KV cache": ranks * cache,
        "weight sync": ranks * bucket,
        "processes": int((CPU_VLLM + CPU_VLLM_RANK * ranks) * GIB),
    }


def _gib(size: float) -> float:
    return round(size / GIB, 2)
