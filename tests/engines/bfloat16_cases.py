# SPDX-License-Identifier: Apache-2.0
"""Training steps in bfloat16 on one rank of either engine, and what the float64 oracle makes of the
hidden states and the LM head that this engine saw.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import ProjectedLogits, collectives
from capo_verl.engines.lm_head import watch_half_precision
from tests.cpu.fsdp.engine_cases import FsdpLayout, make_fsdp_engine
from tests.cpu.megatron.engine_cases import Layout, make_engine
from tests.engines.megatron.capo_cases import make_loss, to_verl
from tests.helpers.batches import inside
from tests.helpers.oracle import Oracle, make_token
from tests.helpers.recording import BETAS, EPS, KNOBS, LEARNING_RATES, RecordedBatch


@dataclass(frozen=True)
class Half:
    """A layout of either engine.

    Args:
        fused: verl's fused cross-entropy with Megatron; FSDP's layouts name their own.
    """

    layout: Layout | FsdpLayout
    temperature: float = 0.7
    fused: bool = False

    @property
    def is_fused(self) -> bool:
        return self.fused or bool(getattr(self.layout, "fused", ""))

    def __str__(self) -> str:
        return f"{self.layout}, fused" if self.fused else str(self.layout)


def make(case: Half, path: str) -> Any:
    """An engine in bfloat16 as verl configures it for GPUs: Megatron with parameters in bfloat16
    and float32 copies of them, FSDP with mixed precision under autocast.
    """
    if isinstance(case.layout, Layout):
        from capo_verl.cpu.megatron import engine as on_cpu

        on_cpu.ENGINE_CONFIG["dtype"] = "bfloat16"
        return make_engine(
            case.layout, path, optimizer="adam",
            optimizer_overrides={"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPS},
            use_fused_kernels=case.fused,
        )  # fmt: skip
    from capo_verl.cpu.fsdp import engine as on_cpu_with_fsdp

    on_cpu_with_fsdp.ENGINE_CONFIG["mixed_precision"]["param_dtype"] = "bf16"
    engine = make_fsdp_engine(case.layout, path, optimizer="AdamW")
    for group in engine.optimizer.param_groups:
        group.update(betas=BETAS, eps=EPS)
    return engine


def batch_of(engine: Any, case: Half, batch: RecordedBatch) -> Any:
    count, rank, dp = len(batch.ids), engine.get_data_parallel_rank(), case.layout.dp
    mine = range(rank * count // dp, (rank + 1) * count // dp)
    settings = {
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "use_remove_padding": engine.model_config.use_remove_padding,
        "use_fused_kernels": engine.engine_config.use_fused_kernels,
    }
    return to_verl(batch, mine, case.temperature, settings)


@dataclass
class Seen:
    """The response tokens of one rank in one optimizer step, ``[tokens, ...]`` each."""

    tp_rank: int
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the filter was given and what it found. ``given``: the logits after temperature, as verl
    takes log-probs of them; before it, as the LM head computes them, where they are fused.
    """
    head: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """``[rows, H]``, this rank's rows as they were multiplied."""
    dtypes: set[torch.dtype] = field(default_factory=set)
    """Of the hidden states and of the LM head."""


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """A context in which the filter's calls are added to ``seen``."""
    from verl.workers.engine.fsdp import transformer_impl as fsdp
    from verl.workers.engine.megatron import transformer_impl as megatron

    parts: list[dict[str, torch.Tensor]] = []
    evaluate = CapoFilter.evaluate

    def evaluated(
        self: Any, hidden: Any, logits: Any, actions: Any, advantages: Any, mask: Any, *args: Any,
        **kwargs: Any
    ) -> Any:  # fmt: skip
        out = evaluate(self, hidden, logits, actions, advantages, mask, *args, **kwargs)
        found = {
            name: getattr(out, name)
            for name in ("objective_shift", "policy_shift", "accepted", "weights")
        }
        given = {"hidden": hidden, "actions": actions, "advantages": advantages}
        parts.append({name: x[mask].clone() for name, x in (given | found).items()})
        parts[-1]["mask"] = mask.flatten()
        if isinstance(logits, ProjectedLogits):
            seen.head = logits.weight.clone()
            parts[-1]["given"] = parts[-1]["hidden"].to(seen.head.dtype) @ seen.head.T
        seen.dtypes |= {hidden.dtype, seen.head.dtype}
        return out

    def keep(logits: torch.Tensor) -> None:
        parts[-1]["given"] = logits.detach().flatten(0, -2)[parts[-1]["mask"]].clone()

    scaled, log_probs = fsdp._scale_logits_by_temperature, "vocab_parallel_log_probs_from_logits"
    of_megatron = getattr(megatron, log_probs)

    def scale(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = scaled(*args, **kwargs)
        keep(logits)
        return logits

    def take(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        keep(logits)
        return of_megatron(logits, labels)

    with ExitStack() as patches:
        for owner, name, instead in (
            (CapoFilter, "evaluate", evaluated),
            (fsdp, "_scale_logits_by_temperature", scale),
            (megatron, log_probs, take),
        ):
            patches.enter_context(mock.patch.object(owner, name, instead))
        yield
    for part in parts:
        del part["mask"]
    seen.columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def keep_head(engine: Any, seen: list[Seen]) -> None:
    """Keep the LM head of every call that is not fused, for the last of ``seen``."""

    def look(call: Any) -> None:
        seen[-1].head = call.head.weight.clone()

    watch_half_precision(engine.lm_head.module, lambda: engine._filtering is not None, look)


@dataclass
class Step:
    loss: float | None
    """Where verl reads it."""
    gradients: list[torch.Tensor]
    """This rank's, before they are clipped."""


def train_step(engine: Any, rate: float, data: Any, knobs: dict[str, Any]) -> Step:
    gradients: list[torch.Tensor] = []
    own = engine.optimizer_step

    def optimizer_step() -> Any:
        gradients.extend(g.detach().clone() for g in engine._gradients())
        return own()

    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    with mock.patch.object(engine, "optimizer_step", optimizer_step), engine.train_mode():
        output = engine.train_batch(data, make_loss("capo", knobs))
    loss = sum(output["loss"]) if engine.is_mp_src_rank_with_outputs() else None
    return Step(loss, gradients)


@dataclass
class Tokens:
    """All tokens of one optimizer step, whichever ranks saw them; ``[tokens, ...]`` in the order of
    their advantages, which name them.
    """

    hidden: np.ndarray
    actions: np.ndarray
    advantages: np.ndarray
    objective_shift: np.ndarray
    policy_shift: np.ndarray
    accepted: np.ndarray
    given: np.ndarray
    """Logits after temperature ``[tokens, V]``, of a product rounded to bfloat16."""
    exact: np.ndarray
    """The same from hidden states and LM head in float64."""
    ranks_agree: bool
    """Tensor-parallel ranks were given and found the same, bit for bit."""


def tokens_of(case: Half, ranks: list[Seen], vocab_size: int) -> Tokens:
    """What the ranks saw of one step, put together."""
    shards = [[s for s in ranks if s.tp_rank == at] for at in sorted({s.tp_rank for s in ranks})]
    names = ranks[0].columns.keys()
    # Of each tensor-parallel rank, its tokens on all data- and context-parallel ranks.
    tables = [{name: torch.cat([s.columns[name] for s in of]) for name in names} for of in shards]
    first = tables[0]
    agree = all(
        torch.equal(table[name], first[name]) for table in tables for name in names - {"given"}
    )
    head = torch.cat([of[0].head for of in shards])[:vocab_size]
    exact = first["hidden"].double() @ head.double().T / case.temperature
    given = torch.cat([table["given"] for table in tables], dim=-1)[:, :vocab_size].double()
    if case.is_fused:
        given = given / case.temperature
    order = first["advantages"].argsort()
    columns = {**first, "given": given, "exact": exact}
    columns = {name: columns[name][order] for name in Tokens.__annotations__ if name in columns}
    return Tokens(
        **{
            name: (x.double() if x.is_floating_point() else x).numpy()
            for name, x in columns.items()
        },
        ranks_agree=agree,
    )


@dataclass
class Judged:
    """The oracle's decisions in one step, ``[tokens]`` each."""

    objective_shift: np.ndarray
    policy_shift: np.ndarray
    accepted: np.ndarray
    distance: np.ndarray
    """Relative distance to the nearer threshold."""


class Judge:
    """The oracle over several steps. Its moments learn from the tokens that the engine accepted."""

    def __init__(self, vocab_size: int, hidden_size: int):
        self._config = CapoConfig(**KNOBS)
        self._oracle = Oracle(vocab_size, hidden_size, top_k=KNOBS["top_k"], betas=BETAS, eps=EPS)

    def step(self, tokens: Tokens, logits: np.ndarray, rate: float) -> Judged:
        given = zip(tokens.hidden, logits, tokens.actions, tokens.advantages, strict=True)
        made = [make_token(*token, self._oracle.top_k) for token in given]
        m_h, m_f = np.array([self._oracle.token_shifts(token, rate) for token in made]).T
        far = [
            np.abs(np.abs(m) / KNOBS[name] - 1)
            for m, name in ((m_h, "objective_shift_max"), (m_f, "policy_shift_max"))
        ]
        self._oracle.update([t for t, kept in zip(made, tokens.accepted, strict=True) if kept])
        verdict = [inside(self._config, *m) for m in zip(m_h, m_f, strict=True)]
        return Judged(m_h, m_f, np.array(verdict), np.minimum(*far))


@dataclass
class Found:
    """What one rank returns; all but the steps is the same on every rank."""

    tokens: list[Tokens]
    judged: dict[str, list[Judged]]
    """By whose logits: ``given`` and ``exact``, a step at a time."""
    filtered: list[Step]
    masked: list[Step]
    """The same engine without a filter, given the oracle's decisions as response mask."""
    dtypes: set[torch.dtype]
    moments: set[torch.dtype]


def compare(case: Half, path: str, tie: float) -> Found:
    """Train with the filter, judge by the oracle, and train anew with the oracle's mask.

    Args:
        tie: relative distance to a threshold up to which the engine's decision is taken over.
    """
    batch, engine = RecordedBatch.make(), make(case, path)
    seen: list[Seen] = []
    if engine.lm_head is not None:
        keep_head(engine, seen)
    filtered, moments = [], set()
    for rate in LEARNING_RATES:
        data = batch_of(engine, case, batch)
        if engine.lm_head is None:
            filtered.append(train_step(engine, rate, data, KNOBS))
            continue
        seen.append(Seen(collectives.rank(engine.lm_head.tp_group)))
        with watched(seen[-1]):
            filtered.append(train_step(engine, rate, data, KNOBS))
        state = engine._step.capo.state_dict()
        moments |= {state["exp_avg"].dtype, state["exp_avg_sq"].dtype}
    everywhere: list[list[Seen]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, seen)
    steps = list(zip(*filter(None, everywhere), strict=True))
    hf_config = engine.model_config.hf_config
    tokens = [tokens_of(case, list(ranks), hf_config.vocab_size) for ranks in steps]
    judged = {}
    for name in ("given", "exact"):
        judge = Judge(hf_config.vocab_size, hf_config.hidden_size)
        judged[name] = [
            judge.step(step, getattr(step, name), rate)
            for step, rate in zip(tokens, LEARNING_RATES, strict=True)
        ]
    del engine
    again, masked = make(case, path), []
    for rate, step, verdict in zip(LEARNING_RATES, tokens, judged["given"], strict=True):
        accepted = np.where(verdict.distance < tie, step.accepted, verdict.accepted)
        kept = dict(zip(step.advantages.tolist(), accepted.tolist(), strict=True))
        data = batch_of(again, case, with_mask(batch, kept))
        masked.append(train_step(again, rate, data, {**KNOBS, "mode": "off"}))
    dtypes = set().union(*(x.dtypes for ranks in steps for x in ranks))
    return Found(tokens, judged, filtered, masked, dtypes, moments)


def with_mask(batch: RecordedBatch, kept: dict[float, bool]) -> RecordedBatch:
    """The batch with the tokens of some advantages, which name them, in its response mask."""
    masked = copy.copy(batch)
    masked.response_mask = [
        torch.tensor([int(m and kept[a]) for a, m in zip(a.tolist(), m.tolist(), strict=True)])
        for a, m in zip(batch.advantages, batch.response_mask, strict=True)
    ]
    return masked
