# SPDX-License-Identifier: Apache-2.0
"""CapoFilter: support -> optimizer model -> curvature -> trust region, for one rank of any parallel
layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.config.capo import POLICY_SHIFTS
from capo_verl.core import collectives
from capo_verl.core.batch_shifts import BatchShifts, RetainedTokens
from capo_verl.core.chunks import block_tokens, chunk_slices
from capo_verl.core.curvature import Shifts, sequence_sums, set_shifts, token_shifts
from capo_verl.core.kernels import choose
from capo_verl.core.logits import LogitRows, ProjectedLogits, ProjectedRows, VocabShard
from capo_verl.core.optimizer_model import AdamModel, OptimizerModel, SgdModel
from capo_verl.core.output import CapoOutput, Stage
from capo_verl.core.penalty import PenaltyTerms, joined_terms, penalises, token_shifts_and_terms
from capo_verl.core.support import Support, find_support
from capo_verl.core.trust_region import judge
from capo_verl.core.validation import (
    Inputs,
    check_inputs,
    find_problems,
    is_count,
    note_overflow,
    raise_for,
    shown,
)
from capo_verl.core.weighting import Weighting, Weights

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _exact(method: _Method) -> _Method:
    """Run without gradients and autocast, which would compute some sums in half precision."""

    @wraps(method)
    def wrapper(self: CapoFilter, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(_Method, wrapper)


class _Decision(NamedTuple):
    """About a block of tokens."""

    stages: list[Stage]
    weights: Weights
    terms: PenaltyTerms | None


class CapoFilter:
    """Decides which response tokens of a policy-gradient step stay in the loss.

    Call :meth:`evaluate` for every micro-batch, then :meth:`step` once, when the optimizer steps.
    Token granularity does not depend on how a mini-batch is cut into micro-batches; ``sequence``
    and ``batch`` see one call: all tokens of a sequence must come in the same call, and a "batch"
    is the tokens of the call.

    Args:
        config: the knobs.
        vocab_size: V, number of real tokens.
        hidden_size: H.
        device: where the moments live.
        tp_group: tensor-parallel group over which the vocabulary is sharded; None = one process
            holds it all.
        dp_group, cp_group: data- and context-parallel groups over which the tokens of a mini-batch
            are spread.
        padded_vocab_size: rows of the LM head over all tensor-parallel ranks, if more than V
            (padding rows are never in a support). Default: V rounded up to the size of
            ``tp_group``.
        kernels: ``triton`` or ``torch``. Default: triton on a GPU where it is installed.

    Raises:
        ValueError: if ``top_k`` exceeds the vocabulary, the sizes do not fit the group, or ``mode``
            is ``off``.
        ImportError: for ``kernels="triton"`` where it is not installed.
    """

    def __init__(
        self,
        config: CapoConfig,
        vocab_size: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        tp_group: collectives.Group = None,
        dp_group: collectives.Group = None,
        cp_group: collectives.Group = None,
        padded_vocab_size: int | None = None,
        kernels: str | None = None,
    ):
        if config.mode == "off":
            raise ValueError(
                "capo.mode=off measures nothing: make no filter, or set capo.mode=track"
            )
        tp = collectives.size(tp_group)
        for name, size in (
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("padded_vocab_size", padded_vocab_size),
        ):
            if not is_count(size, least=1) and (size is not None or name != "padded_vocab_size"):
                raise ValueError(f"{name}={shown(size)}: expected an integer >= 1")
        if padded_vocab_size is None:
            padded_vocab_size = -(-vocab_size // tp) * tp
        if config.top_k is not None and config.top_k > vocab_size:
            raise ValueError(
                f"capo.top_k={config.top_k} exceeds the vocabulary of {vocab_size} tokens; use "
                "null for the whole vocabulary"
            )
        if padded_vocab_size < vocab_size or padded_vocab_size % tp:
            raise ValueError(
                f"padded_vocab_size={padded_vocab_size} must be >= vocab_size={vocab_size} and a "
                f"multiple of the tensor-parallel size {tp}"
            )
        if collectives.size(cp_group) > 1 and config.stages != ("token",):
            raise ValueError(
                f"capo.granularity={config.granularity!r} needs whole sequences on a rank, but "
                "context parallelism of size "
                f"{collectives.size(cp_group)} splits them; set capo.granularity=token"
            )
        if collectives.size(cp_group) > 1 and penalises(config):
            raise ValueError(
                f"capo.policy_penalty={config.policy_penalty} and "
                f"capo.objective_penalty={config.objective_penalty} need whole "
                "sequences on a rank, but context parallelism of size "
                f"{collectives.size(cp_group)} splits them; set both to 0"
            )
        rows = padded_vocab_size // tp
        self.config = config
        self.hidden_size = hidden_size
        self.shard = VocabShard(vocab_size, rows, collectives.rank(tp_group) * rows)
        self.tp_group, self.dp_group, self.cp_group = tp_group, dp_group, cp_group
        self._device = device = torch.device(device or "cpu")
        self._kernels = choose(device, kernels)
        self.model: OptimizerModel = (
            AdamModel(
                self.shard, hidden_size, config.betas, config.eps, device,
                getattr(torch, config.moments_dtype), self._kernels,
            )
            if config.optimizer_model == "adam"
            else SgdModel()
        )  # fmt: skip
        self._weighting = Weighting(config, device, (dp_group, cp_group))
        self._retained = RetainedTokens(config.batch_shift_tokens)
        self.keep_for_batch_shifts = True
        """True if :meth:`evaluate` keeps what :meth:`batch_shifts` needs; set to False for steps
        that will not ask.
        """

    def set_optimizer(self, betas: tuple[float, float], eps: float) -> None:
        """Follow the real optimizer's hyper-parameters, should they change during training.

        Raises:
            ValueError: for what ``CapoConfig`` refuses as ``betas`` and ``eps``.
        """
        checked = replace(self.config, betas=betas, eps=eps)
        if isinstance(self.model, AdamModel):
            self.model.betas, self.model.eps = checked.betas, checked.eps

    @_exact
    def evaluate(
        self,
        hidden_states: Tensor,
        logits: Tensor | ProjectedLogits,
        actions: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        learning_rate: float,
        *,
        temperature: Tensor | None = None,
        skip_masked: bool = False,
        sequence_ids: Tensor | None = None,
        num_sequences: int | None = None,
        max_tokens: int | None = None,
        check_values: bool = True,
    ) -> CapoOutput:
        """Predict the shifts of every token, decide, and remember the accepted gradients for
        :meth:`step`.

        Args:
            hidden_states: ``[..., H]``, input of the LM head at the position that predicts the
                token. Kept by reference until :meth:`step`, unless ``skip_masked`` makes a copy;
                modifying it in place before is an error there. All other tensors may change.
            logits: ``[..., rows]``, after temperature, this rank's vocabulary rows. Only read. A
                masked vocabulary has a finite floor, such as -1e4, in place of -inf. Or
                :class:`ProjectedLogits`: the LM head, which the filter multiplies with the hidden
                states itself, a run of tokens at a time.
            actions: ``[...]`` integer, global ids of the taken tokens.
            advantages: ``[...]``, or of the same number of dimensions and broadcastable, or a
                scalar.
            response_mask: ``[...]`` bool or 0/1. Values outside it may be anything, also
                non-finite.
            learning_rate: alpha of the coming optimizer step.
            temperature: ``[...]`` > 0; if given, ``logits`` are before temperature and divided by
                it in their own dtype, those of :class:`ProjectedLogits` in float32 at least.
            skip_masked: evaluate only the tokens of the mask; the shifts of the others are reported
                as 0. Saves the work for prompts and padding.
            sequence_ids: ``[...]`` integer in ``0..num_sequences``, for packed layouts. Default:
                the last dimension is time, every row a sequence of its own.
            num_sequences: required with ``sequence_ids``.
            max_tokens: with ``skip_masked``, an upper bound of the number of tokens in the mask,
                known without asking the device for it; more tokens are an error. Default on a GPU:
                all positions, at the cost of memory for those outside the mask.
            check_values: raise for unusable values, which waits for the device. If False they are
                only marked in the result, and the caller has to :meth:`discard` the mini-batch.

        Returns:
            :class:`CapoOutput`. float64 inputs are evaluated in float64, all others in float32.

        Raises:
            ValueError: for wrong types or shapes; for values inside the mask that are not finite,
                whose products are not, or that are no token ids (how many, where). For penalties
                without logits. Nothing has changed then.
            RuntimeError: if earlier ``hidden_states`` were modified in place.
        """
        self.model.check()
        if penalises(self.config) and isinstance(logits, ProjectedLogits):
            raise ValueError(
                "capo.policy_penalty and capo.objective_penalty are functions of the logits, but "
                "logits is ProjectedLogits: pass the logits, or set both to 0"
            )
        inputs = check_inputs(
            hidden_states, logits, actions, advantages, response_mask, learning_rate,
            temperature=temperature, skip_masked=skip_masked, sequence_ids=sequence_ids,
            num_sequences=num_sequences, max_tokens=max_tokens, hidden_size=self.hidden_size,
            shard=self.shard, dtype=self.model.dtype,
        )  # fmt: skip
        dtype = inputs.advantages.dtype
        rows = (
            ProjectedRows(inputs.logits, inputs.hidden, inputs.temperature)
            if isinstance(inputs.logits, ProjectedLogits)
            else LogitRows(inputs.logits, inputs.positions, inputs.temperature)
        )
        # Decisions about tokens are made a block at a time: scratch memory does not grow with the
        # tokens of a call.
        size = (
            block_tokens(inputs.hidden.device)
            if self.config.stages == ("token",)
            else len(inputs.mask)
        )
        blocks = list(chunk_slices(len(inputs.mask), max(1, size))) or [slice(0, 0)]
        supports = [
            find_support(
                rows.part(tokens), inputs.actions[tokens], self.config.top_k, self.shard, dtype,
                self.tp_group, self._kernels
            )
            for tokens in blocks
        ]  # fmt: skip
        problems = find_problems(
            inputs,
            _joined([s.finite for s in supports]),
            self.shard,
            self.model.gradient_limit(dtype),
        )
        inputs = inputs._replace(
            sequence=inputs.sequence.clamp(0, max(0, inputs.num_sequences - 1)),
        )
        parts = [inputs.part(tokens) for tokens in blocks]
        decisions = [
            self._decide(part, support, tokens.start)
            for part, tokens, support in zip(parts, blocks, supports, strict=True)
        ]
        stages = [
            Stage(same[0].granularity,
                *(_joined(list(x)) for x in zip(*(s[1:] for s in same), strict=True)))
            for same in zip(*(decision.stages for decision in decisions), strict=True)
        ]  # fmt: skip
        if not isinstance(self.model, AdamModel) or self.model.eps > 0:  # else 0 / 0 is expected
            shifts = [x for s in stages for x in (s.objective_shift, s.policy_shift)]
            note_overflow(problems, inputs.mask, shifts)
        if check_values:
            raise_for(problems, inputs, self.shard)
        verdict = stages[-1].verdict
        weights = Weights(
            *map(
                _joined, map(list, zip(*(decision.weights for decision in decisions), strict=True))
            )
        )
        stages = [Stage(s.granularity, *map(inputs.restore, s[1:])) for s in stages]
        terms = [decision.terms for decision in decisions if decision.terms is not None]
        out = CapoOutput(
            objective_shift=stages[0].objective_shift,
            policy_shift=stages[0].policy_shift,
            accepted=inputs.restore(weights.accepted),
            weights=inputs.restore(weights.applied),
            trust_weights=inputs.restore(weights.trusted),
            in_trust_region=inputs.restore(verdict),
            in_support=inputs.restore(_joined([s.inside for s in supports])),
            problems={what: inputs.restore(bad) for what, bad in problems.items()},
            stages=tuple(stages),
            penalty_terms=joined_terms(terms, inputs) if terms else None,
        )
        # From here on things change: what can be refused has been.
        soft = self.config.weighting != "hard"
        if self.keep_for_batch_shifts:
            if soft:
                kept, advantages = inputs.mask, inputs.advantages * weights.trusted
            else:
                kept, advantages = verdict, inputs.advantages
            self._retained.add(inputs, supports, kept, advantages)
        self.model.promote(dtype)
        for part, support, decision in zip(parts, supports, decisions, strict=True):
            applied = decision.weights
            self._weighting.add(
                decision.stages[-1].policy_shift, applied.trusted, part.mask, part.learning_rate
            )
            advantages = part.advantages * applied.applied if soft else part.advantages
            self.model.accumulate(part.hidden, advantages, support, applied.accepted)
        return out

    @_exact
    def step(self) -> None:
        """Update the moments with the accepted gradients since the last call, over all data- and
        context-parallel ranks.

        Call it once per optimizer step, on every rank. With no accepted token anywhere the moments
        stay as they are. Threshold, balance of signs and guard, where the config asks for them,
        move here too, from sums over the same ranks.

        Raises:
            RuntimeError: if ``hidden_states`` were modified in place since they were evaluated;
                nothing has changed then.
        """
        self.model.check()
        self._weighting.step(self.model.is_settled, self.model.dtype)
        self.model.update((self.dp_group, self.cp_group))
        self._retained.clear()

    @_exact
    def batch_shifts(self, policy_shift: str | None = None) -> BatchShifts:
        """m_H and m_F of all tokens since the last :meth:`step` as one batch, ``before`` and
        ``after`` filtering.

        Call it before :meth:`step`, on every rank. It covers the first ``batch_shift_tokens``
        tokens of each rank.

        Args:
            policy_shift: ``sampled`` or ``exact``, in place of the config's.

        Raises:
            RuntimeError: with ``batch_shift_tokens=0``, or if ``hidden_states`` were modified in
                place since they were evaluated.
            ValueError: for another ``policy_shift``.
        """
        if policy_shift not in (None, *POLICY_SHIFTS):
            raise ValueError(
                f"policy_shift={shown(policy_shift)}: expected {' or '.join(POLICY_SHIFTS)}"
            )
        exact = (policy_shift or self.config.policy_shift) == "exact"
        return self._retained.shifts(self.model, self.tp_group, self.dp_group, self.cp_group, exact)

    @property
    def batch_shift_coverage(self) -> Tensor:
        """Share of this rank's response tokens since the last :meth:`step` which
        :meth:`batch_shifts` covers, scalar.
        """
        return self._retained.coverage

    def discard(self) -> None:
        """Forget everything evaluated since the last :meth:`step`, as if it had not been."""
        self.model.discard()
        self._weighting.discard()
        self._retained.clear()

    def to(self, device: torch.device | str) -> None:
        """Move the moments to ``device``, to give its memory to others between training steps, and
        back.
        """
        self.model.move(torch.device(device))
        self._weighting.move(torch.device(device))

    def state_dict(self) -> dict[str, Any]:
        """This rank's rows: ``{"exp_avg", "exp_avg_sq": [rows, H], "step": int}``; empty for
        ``sgd``.
        """
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of :meth:`state_dict`.

        Raises:
            ValueError: if keys, shapes or values are not those of this filter; it is unchanged
                then.
        """
        self.model.load_state_dict(state)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, and change nothing."""
        self.model.check_state_dict(state)

    def adaptive_state(self) -> dict[str, float]:
        """State of what adapts besides the moments: threshold and guard. Empty if nothing
        does.

        Equal on all ranks. Waits for the device.
        """
        return self._weighting.state()

    def load_adaptive_state(self, state: dict[str, float]) -> None:
        """Take over the state of :meth:`adaptive_state`. Entries for what this config does not
        adapt are left alone.

        Raises:
            ValueError: for an unknown name or a value that is no number; nothing is changed then.
        """
        self._weighting.load(state)

    def check_adaptive_state(self, state: dict[str, float]) -> None:
        """Raise what :meth:`load_adaptive_state` would raise, and change nothing."""
        self._weighting.check(state)

    @property
    def policy_shift_max(self) -> float | Tensor | None:
        """tau_F at the learning rate of the last :meth:`evaluate`, a scalar on the device if it
        adapts (infinite until it is known, also before the first call); None or 0 = no test.
        """
        return self._weighting.policy_shift_max()

    def adaptive_metrics(self) -> dict[str, Tensor]:
        """``capo/policy_threshold``, tau_F of the last :meth:`evaluate`, and
        ``capo/filter_stopped``, scalars on the device, where the config makes them move.
        """
        return self._weighting.metrics()

    @property
    def filter_stopped(self) -> Tensor | None:
        """Scalar bool on the device, whether the guard ``max_rejection`` has ended the filtering;
        None without it.
        """
        return self._weighting.stopped

    def _decide(self, inputs: Inputs, support: Support, first_token: int) -> _Decision:
        """Apply all granularities to a block of tokens; nothing is remembered."""
        stages: list[Stage] = []
        verdict, terms = inputs.mask, None
        for granularity in self.config.stages:
            if penalises(self.config):  # of single tokens: there is one stage
                shifts, terms = token_shifts_and_terms(
                    self.model,
                    support,
                    inputs,
                    self.config,
                    self.shard.rows,
                    first_token,
                    self.tp_group,
                )
            else:
                shifts = self._shifts(granularity, inputs, support, verdict)
            objective_ok, policy_ok = judge(
                self.config,
                shifts,
                self._weighting.policy_shift_max(inputs.learning_rate),
                inputs.learning_rate,
            )
            verdict = verdict & objective_ok & policy_ok
            stages.append(Stage(granularity, *shifts, objective_ok, policy_ok, verdict))
        weights = self._weighting.weigh(
            stages[-1].policy_shift, verdict, inputs.mask, inputs.learning_rate
        )
        return _Decision(stages, weights, terms)

    def _shifts(
        self, granularity: str, inputs: Inputs, support: Support, include: Tensor
    ) -> Shifts:
        exact = self.config.policy_shift == "exact"
        if granularity == "token":
            return token_shifts(
                self.model,
                support,
                inputs.hidden,
                inputs.advantages,
                inputs.learning_rate,
                self.tp_group,
                exact,
            )
        whole_batch = granularity == "batch"
        group = torch.zeros_like(inputs.sequence) if whole_batch else inputs.sequence
        n_groups = 1 if whole_batch else inputs.num_sequences
        per_token = set_shifts(
            self.model, support, [inputs.hidden], inputs.advantages, include, group, n_groups,
            inputs.learning_rate, self.tp_group, exact=exact,
        )  # fmt: skip
        sums, tokens = sequence_sums(per_token, include, inputs.sequence, inputs.num_sequences)
        means = [x / tokens.clamp(min=1) for x in sums]
        if whole_batch:
            means = [(x.sum() / (tokens > 0).sum().clamp(min=1)).expand_as(x) for x in means]
        zero = torch.zeros((), device=include.device, dtype=means[0].dtype)
        return Shifts(*(torch.where(include, x[inputs.sequence], zero) for x in means))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
