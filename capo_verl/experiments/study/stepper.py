# SPDX-License-Identifier: Apache-2.0
"""The optimizer steps of one rollout: loss, filter, KL budget, controls, measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter, CapoOutput
from capo_verl.core.kl_budget import STEPS_BACK, KLBudget, decay
from capo_verl.core.logits import VocabShard
from capo_verl.core.penalty import curvature_penalty
from capo_verl.core.token_kl import k3, token_kl
from capo_verl.experiments.study.config import LoopConfig
from capo_verl.experiments.study.objective import Batch, aggregate, policy_loss
from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.selection import kept_at_random, weights_of_selection


class Measured(TypedDict, total=False):
    """Measurements of one optimizer step: 0-dim tensors, numbers, None if not measured."""

    tokens: Tensor
    accepted_tokens: Tensor
    entropy: Tensor
    rejection: Tensor
    rejection_positive: Tensor
    rejection_negative: Tensor
    outside: Tensor | None
    weight: Tensor | None
    out_of_region: Tensor | None
    ratio_deviation: Tensor
    grad_norm: Tensor
    kl: Tensor | None
    scale: float


ADAPTIVE_RATES = (1e-5, 1e-2)
"""Within these ``lr_adaptive`` stays."""
OUTSIDE = 50
"""A sampled token is ``outside`` if so many tokens are more likely: the paper's support."""


class Policy(Protocol):
    """A language model whose trained parameters are one vector."""

    vocab_size: int
    hidden_size: int
    flat: Tensor

    @property
    def gradient(self) -> Tensor: ...

    def at_responses(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[N, H]`` and logits ``[N, V]`` that predict the response tokens.

        Args:
            tokens: ``[B, P + T]``; mask: ``[B, T]`` bool, N of them True, taken row by row.
        """

    def sample(
        self, prompts: Tensor, length: int, generator: torch.Generator, end: int | None = None
    ) -> Tensor:
        """Responses ``[B, length]`` at temperature 1, arbitrary behind the first ``end``."""


@dataclass
class Rollout:
    """Completions of one rollout; groups are neighbours."""

    tokens: Tensor
    """``[B, P + T]`` int64."""
    mask: Tensor
    """``[B, T]`` bool."""
    advantages: Tensor
    """``[B]`` float32."""
    group: Tensor
    """``[B]`` int64."""
    old_log_prob: Tensor | None = None
    """``[B, T]``; None: that of the model at the time of the update (one step per rollout)."""

    @property
    def actions(self) -> Tensor:
        """``[B, T]`` int64."""
        return self.tokens[:, -self.mask.shape[1] :]

    def part(self, rows: slice | Tensor) -> Rollout:
        old = None if self.old_log_prob is None else self.old_log_prob[rows]
        return Rollout(
            self.tokens[rows], self.mask[rows], self.advantages[rows], self.group[rows], old
        )


class Seen(NamedTuple):
    """The last optimizer step, for those who watch."""

    rollout: Rollout
    log_prob: Tensor
    """``[B, T]``, before the step."""
    kept: Tensor
    """``[B, T]`` bool, tokens in the loss."""
    output: CapoOutput | None
    """Of the response tokens, ``[N]`` each."""


class Stepper:
    """Adam, the filter, the budget and their state.

    Args:
        scales: factors of the learning rate step by step, in place of ``lr_scale`` (controls).
        drops: numbers of tokens to drop at random step by step (controls).
    """

    def __init__(
        self,
        config: LoopConfig,
        model: Policy,
        scales: Sequence[float] | None = None,
        drops: Sequence[int] | None = None,
    ):
        self.config, self.model, self.scales, self.drops = config, model, scales, drops
        self.optimizer = torch.optim.Adam(
            [model.flat], lr=config.lr, betas=config.betas, fused=True
        )
        self.drop = generator(config.seed, "random drop")
        self.shard = VocabShard(model.vocab_size, model.vocab_size, 0)
        self.reference = model.flat.detach().clone() if config.reference_penalty else None
        self.steps = 0
        self.adaptive_rate = config.lr
        self.factors: list[float] = []
        self.last: Seen | None = None
        knobs = config.capo_knobs()
        capo = None if knobs is None else CapoConfig.from_mapping(knobs)
        budget = None if capo is None else capo.kl_budget
        self.budget = None if budget is None else KLBudget(budget)
        self.filter: CapoFilter | None = None
        self.filters = capo is not None and capo.mode == "filter"
        if capo is not None and capo.mode != "off":
            self.filter = CapoFilter(capo, model.vocab_size, model.hidden_size)
            self.filter.keep_for_batch_shifts = False

    def update(self, rollout: Rollout) -> Iterator[Measured]:
        """All optimizer steps of one rollout; yields what was measured in each."""
        config = self.config
        if config.mini_batches * config.epochs > 1:
            with torch.no_grad():
                _, logits = self._logits(rollout)
                rollout.old_log_prob = _spread(_taken(logits, rollout), rollout.mask)
        size = len(rollout.tokens) // config.mini_batches
        keep, before = config.reposition, self.model.flat.detach()
        if keep is not None:
            before = before.clone()
        for epoch in range(config.epochs):
            if keep is not None and epoch == config.epochs - 1:
                with torch.no_grad():
                    self.model.flat.copy_(torch.lerp(before, self.model.flat, keep))
            for start in range(0, len(rollout.tokens), size):
                yield self._step(rollout.part(slice(start, start + size)), epoch)

    def _logits(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        return self.model.at_responses(rollout.tokens, rollout.mask)

    def _step(self, rollout: Rollout, epoch: int) -> Measured:
        config, rate, response = self.config, self._rate(), rollout.mask
        hidden, logits = self._logits(rollout)
        log_probs = logits.log_softmax(-1)
        taken = rollout.actions[response][:, None]
        log_prob = _spread(log_probs.gather(-1, taken)[:, 0], response)
        with torch.set_grad_enabled(bool(config.entropy_bonus)):
            entropy = _spread(-(log_probs.exp() * log_probs).sum(-1), response)
        old_log_prob = log_prob.detach() if rollout.old_log_prob is None else rollout.old_log_prob
        advantages = rollout.advantages[:, None].expand_as(log_prob)

        mask = response
        output = self._evaluate(hidden, logits, rollout, advantages, rate)
        if output is not None and self.filters:
            mask = _spread(output.accepted, response)
            if config.drop_sign is not None:
                dropped = advantages > 0 if config.drop_sign == "positive" else advantages < 0
                mask = mask | (response & ~dropped)
            if self.filter is not None and self.filter.config.weighting != "hard":
                # Losses are positively homogeneous in the advantage, so that is where a weight
                # belongs.
                advantages = advantages * _spread(output.weights.to(advantages.dtype), response)
        if config.select is not None:
            shift = None if output is None else output.policy_shift.to(advantages.dtype)
            shift = None if shift is None else _spread(shift, response)
            weights = weights_of_selection(config.select, mask, advantages, entropy.detach(), shift)
            mask, advantages = mask & (weights > 0), advantages * weights
        count = None if self.drops is None else self.drops[self.steps]
        mask = mask & kept_at_random(response, self.drop, config.random_drop, count)
        self.last = Seen(rollout, log_prob.detach(), mask, output)
        batch = Batch(
            old_log_prob, log_prob, advantages, mask, response,
            entropy.detach(), rollout.group, rollout.actions,
        )  # fmt: skip
        loss = policy_loss(config, batch, epoch) + self._penalties(
            batch, entropy, logits, output, rollout
        )
        gradient = self.model.gradient.zero_()
        loss.backward()
        norm = torch.linalg.vector_norm(gradient)
        if config.grad_clip:
            gradient.mul_((config.grad_clip / (norm + 1e-6)).clamp(max=1.0))

        kl, kept = self._move(rollout, logits.detach(), log_prob.detach(), rate)
        factor = rate / self._scheduled()
        if self.filter is not None:
            self.filter.step()
        self.steps += 1
        self.factors.append(factor * kept)
        with torch.no_grad():
            total = response.sum()
            ratio = (log_prob - old_log_prob).exp()
            return {
                "tokens": total,
                "accepted_tokens": mask.sum(),
                "entropy": entropy.sum() / total,
                "rejection": 1 - mask.sum() / total,
                "rejection_positive": _share(response & ~mask, response & (advantages > 0)),
                "rejection_negative": _share(response & ~mask, response & (advantages < 0)),
                "outside": self._outside(logits, taken),
                "weight": None if output is None else output.weights.mean(),
                "out_of_region": None
                if output is None
                else 1 - output.in_trust_region.sum() / total,
                "ratio_deviation": ((ratio - 1).abs() * response).sum() / total,
                "grad_norm": norm,
                "kl": kl,
                "scale": factor * kept,
            }

    def _outside(self, logits: Tensor, taken: Tensor) -> Tensor | None:
        """Share of the sampled tokens that are not among the :data:`OUTSIDE` most likely."""
        if self.model.vocab_size <= OUTSIDE:
            return None
        rank = (logits > logits.gather(-1, taken)).sum(-1)
        return (rank >= OUTSIDE).double().mean()

    def _evaluate(
        self, hidden: Tensor, logits: Tensor, rollout: Rollout, advantages: Tensor, rate: float
    ) -> CapoOutput | None:
        """Verdict of the filter on the response tokens, ``[N]`` each."""
        if self.filter is None:
            return None
        return self.filter.evaluate(
            hidden.detach(),
            logits.detach(),
            rollout.actions[rollout.mask],
            advantages[rollout.mask],
            torch.ones(len(logits), dtype=torch.bool),
            rate,
            sequence_ids=rollout.mask.nonzero()[:, 0],
            num_sequences=len(rollout.mask),
        )

    @property
    def _progress(self) -> float:
        """Part of the run that is over before this optimizer step."""
        config = self.config
        return self.steps / max(1, config.steps * config.mini_batches * config.epochs - 1)

    def _scheduled(self) -> float:
        """The learning rate of the schedule: warm-up and decay."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / max(1, config.warmup))
        return config.lr * warm * math.sqrt(decay(self._progress, config.lr_final))

    def _rate(self) -> float:
        """The learning rate of the coming step."""
        scheduled = self._scheduled()
        if self.budget is not None:
            peak = self.config.lr * self.config.lr_scale
            completions = self.config.prompts * self.config.group // self.config.mini_batches
            return self.budget.begin_step(
                scheduled * self.config.lr_scale, peak, self._progress, completions
            )
        if self.config.lr_adaptive is not None:
            return self.adaptive_rate
        factor = self.config.lr_scale if self.scales is None else self.scales[self.steps]
        return scheduled * factor

    def _penalties(
        self,
        batch: Batch,
        entropy: Tensor,
        logits: Tensor,
        output: CapoOutput | None,
        rollout: Rollout,
    ) -> Tensor | float:
        """Terms added to the policy loss, aggregated as it is."""
        config = self.config
        total: Tensor | float = 0.0
        if output is not None and output.penalty_terms is not None:
            penalty = curvature_penalty(logits, output.penalty_terms)
            total = aggregate(_spread(penalty, rollout.mask), batch, config.aggregation)
        if config.entropy_bonus:
            total = total - config.entropy_bonus * aggregate(entropy, batch, config.aggregation)
        if self.reference is not None:
            with torch.no_grad():
                now = self.model.flat.clone()
                self.model.flat.copy_(self.reference)
                reference = _taken(self._logits(rollout)[1], rollout)
                self.model.flat.copy_(now)
            k3_of = k3(batch.log_prob, _spread(reference, rollout.mask))
            penalty = aggregate(k3_of, batch, config.aggregation)
            total = total + config.reference_penalty * penalty
        return total

    def _move(
        self, rollout: Rollout, logits: Tensor, log_prob: Tensor, rate: float
    ) -> tuple[Tensor | None, float]:
        """Make the optimizer step.

        Returns the measured KL of the whole mini-batch (or None), and the kept share of the step.
        """
        budget, kept, before = self.budget, 1.0, None
        if budget is not None and budget.config.line_search is not None:
            before = self.model.flat.detach().clone()
        moves = bool(self.model.gradient.any())
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        if budget is not None and moves:
            kl = float(self._probe(rollout, logits, log_prob))
            budget.end_step(kl)
            for _ in range(STEPS_BACK):
                keep = budget.needs_line_search(kl)
                if keep is None or before is None:
                    break
                kept *= keep
                with torch.no_grad():
                    self.model.flat.copy_(torch.lerp(before, self.model.flat, keep))
                kl = float(self._probe(rollout, logits, log_prob))
        measured = None
        if self._reports_kl() or self.config.lr_adaptive is not None:
            measured = self._kl(rollout, logits)
        if self.config.lr_adaptive is not None and measured is not None:
            self._adapt(float(measured), self.config.lr_adaptive)
        return measured, kept

    def _reports_kl(self) -> bool:
        """True in every ``kl_every``-th step, and of several mini-batches in another one each
        time.
        """
        every, turn = self.config.kl_every, 0
        if self.config.mini_batches * self.config.epochs > 1:
            turn = self.steps // every % every
        return self.steps % every == turn

    def _adapt(self, kl: float, desired: float) -> None:
        low, high = ADAPTIVE_RATES
        if kl > 2 * desired:
            self.adaptive_rate = max(low, self.adaptive_rate / 1.5)
        elif 0 < kl < desired / 2:
            self.adaptive_rate = min(high, self.adaptive_rate * 1.5)

    def _probe(self, rollout: Rollout, logits: Tensor, log_prob: Tensor) -> Tensor:
        """The budget's own measurement: mean token KL of an evenly strided share of the samples."""
        assert self.budget is not None
        config, n = self.budget.config, len(rollout.tokens)
        size = max(1, round(config.probe_share * n))
        rows = torch.arange(size) * n // size
        part = rollout.part(rows)
        if config.estimator == "exact":
            sequence = rollout.mask.nonzero()[:, 0]
            return self._kl(part, logits[torch.isin(sequence, rows)])
        with torch.no_grad():
            new = _taken(self._logits(part)[1], part)
            return k3(log_prob[rows][part.mask], new).mean()

    @torch.no_grad()
    def _kl(self, rollout: Rollout, logits: Tensor) -> Tensor:
        """Exact mean token KL(old || new); ``logits [N, V]`` are the old ones."""
        return token_kl(logits, self._logits(rollout)[1], self.shard).mean()


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """``values [N]`` where ``mask [B, T]`` is True, row by row; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _taken(logits: Tensor, rollout: Rollout) -> Tensor:
    """Log-probabilities ``[N]`` of the response tokens."""
    taken = rollout.actions[rollout.mask][:, None]
    return logits.log_softmax(-1).gather(-1, taken)[:, 0]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Share of ``whole`` that is in ``part``, both bool; 0 of nothing."""
    return (part & whole).sum() / whole.sum().clamp(min=1)
