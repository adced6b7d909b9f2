# SPDX-License-Identifier: Apache-2.0
"""The KL divergence that an optimizer step causes, measured on some response tokens of its
mini-batch.

The policy before the step is the one that was trained: what its LM head made of some micro-batches
is kept. After the step the same micro-batches run once more, in the same layout, so what is
compared lies at the same places.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from capo_verl.core import ProjectedLogits, collectives
from capo_verl.core.kl_budget import KEPT_BYTES
from capo_verl.core.order_statistics import nearest_rank, ordered_keys
from capo_verl.core.token_kl import k3, token_kl
from capo_verl.engines.lm_head import LMHead, LMHeadCall, reproduces
from capo_verl.engines.response import PackedResponse, accepted_response, choose_tokens
from capo_verl.engines.timer import Timer

logger = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"

PROBED = "capo_probed"
"""Key of a response mask, of the tokens that are probed; only probed micro-batches have it."""
PLACE = "capo_place"
"""Key of a probed micro-batch's number among them, and of how many of its tokens are probed."""

ROUNDED = (
    "capo.kl_budget: the KL is measured from logits in half precision, because this model changes "
    "them after its LM head (soft-capping, scaling) or has adapters on it, and they cannot be "
    "computed again in float32. Their rounding adds to capo/kl_floor; a capo.kl_budget.delta below "
    "that is out of reach. capo.kl_budget.estimator=k3 needs no logits"
)


class MeasuredKL(NamedTuple):
    """The KL divergence of one optimizer step, the same on all ranks of the run."""

    mean: float
    """Nats per response token."""
    p99: float
    tokens: int


class Selection(NamedTuple):
    """The probed part of a rank's share of a mini-batch."""

    batch: TensorDict
    """Its samples, for a forward pass without entropy or distillation."""
    micro_batches: list[TensorDict]
    indices: list[list[int]]
    """Rows of ``batch`` in each micro-batch."""


def probed_rows(
    partition: Sequence[Sequence[int]], share: float, multiple: int = 1
) -> list[tuple[int, list[int]]]:
    """Micro-batches to probe, evenly spread, and the samples of each: all of them, or of fewer
    micro-batches than ``1 / share`` a part of each.

    Args:
        partition: samples of each micro-batch.
        multiple: divides the number of micro-batches probed (interleaved pipelines).
    """
    count = max(1, math.ceil(len(partition) * share - 1e-9))
    count = min(len(partition), -(-count // multiple) * multiple)
    part = min(1.0, share * len(partition) / count)
    return [
        (i, [partition[i][j] for j in _spread(len(partition[i]), part)])
        for i in (k * len(partition) // count for k in range(count))
    ]


def _spread(total: int, share: float) -> list[int]:
    count = max(1, math.ceil(total * share - 1e-9))
    return [i * total // count for i in range(count)]


def select(
    data: TensorDict,
    micro_batches: Sequence[TensorDict],
    indices: Sequence[Sequence[int]] | None,
    share: float,
    multiple: int,
    limit: int,
) -> Selection:
    """Choose what is probed, and mark it in the micro-batches that are about to run.

    Args:
        data: this rank's share of the mini-batch, on the host.
        micro_batches, indices: as verl's ``prepare_micro_batches`` returns them.
        share, multiple: see :func:`probed_rows`.
        limit: most tokens.
    """
    # Here and not above: loading verl's engines loads ours.
    from verl.utils import tensordict_utils as tu

    if indices is None:
        size = len(data) // len(micro_batches)
        indices = [range(i * size, (i + 1) * size) for i in range(len(micro_batches))]
    chosen = probed_rows(indices, share, multiple)
    samples = [sample for _, rows in chosen for sample in rows]
    marked = data.select(*data.keys())
    marked[PROBED] = choose_tokens(data["response_mask"], samples, limit)
    batch = tu.index_select_tensor_dict(marked, samples)
    tu.maybe_fix_3d_position_ids(batch)
    off = dict.fromkeys(
        ("calculate_entropy", "calculate_sum_pi_squared", "distillation_use_topk"), False
    )
    tu.assign_non_tensor(batch, force_group_size=1, **off)
    parts: list[TensorDict] = []
    rows_of: list[list[int]] = []
    for place, (i, rows) in enumerate(chosen):
        start = sum(len(each) for each in rows_of)
        rows_of.append(list(range(start, start + len(rows))))
        part = tu.index_select_tensor_dict(batch, rows_of[-1])
        tu.maybe_fix_3d_position_ids(part)
        whole = tu.index_select_tensor_dict(marked.select(PROBED), list(indices[i]))
        micro_batches[i][PROBED] = whole[PROBED]
        count = int(_values(part[PROBED]).sum())
        for micro_batch in (micro_batches[i], part):
            tu.assign_non_tensor(micro_batch, **{PLACE: (place, count)})
        parts.append(part)
    return Selection(batch, parts, rows_of)


class KLProbe:
    """Collects what the two forward passes see on this rank.

    Args:
        head: None on a rank without LM head, which only learns the result.
        estimator: ``exact`` keeps the old policy's logits of the probed tokens, ``k3`` the
            log-probabilities. Logits in half precision are replaced by the same product in float32,
            unless the model changes them after its LM head.
        device: where the training runs.
        timer: runs while the first pass is looked at.
    """

    def __init__(self, head: LMHead | None, estimator: str, device: torch.device, timer: Timer):
        self._head, self._estimator, self._device = head, estimator, device
        self._timer = timer
        self._pass: str | None = None
        self._recomputes = True
        """True if logits in half precision are replaced.

        Until it is settled, each micro-batch says if they can be.
        """
        self._settled = estimator != "exact"
        self.discard()

    @property
    def limit(self) -> int:
        """Most tokens of this rank's share of a mini-batch, so that :data:`KEPT_BYTES` hold their
        logits in float32.
        """
        if self._head is None or self._estimator != "exact":
            return 2**62
        return max(1, KEPT_BYTES // (4 * self._head.shard.rows))

    @property
    def sees_logits(self) -> bool:
        """True in a pass that has to be shown this rank's logits."""
        return self._pass is not None and self._estimator == "exact" and self._head is not None

    @property
    def sees_head(self) -> bool:
        """True in a pass that has to be shown the calls of an LM head in half precision as well."""
        return self.sees_logits and self._recomputes

    @property
    def loss_function(self) -> Any:
        """The loss function of the pass after the step: with ``k3`` it picks up the
        log-probabilities.
        """
        return self._see_log_probs if self._estimator == "k3" else None

    def wrap_loss(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """The training's loss function; with ``k3`` it shows its log-probabilities first."""
        if self._estimator != "k3":
            return loss_function

        def watched(model_output: dict[str, Tensor], data: TensorDict, **kwargs: Any) -> Any:
            self._see_log_probs(model_output, data)
            return loss_function(model_output=model_output, data=data, **kwargs)

        return watched

    def discard(self) -> None:
        """Forget the old policy, and what was measured."""
        self._old: dict[int, Tensor] = {}
        self._found: list[tuple[Tensor, Tensor]] = []
        self._call: tuple[Tensor | None, Tensor] | None = None
        self._verdicts: list[Tensor] = []

    @contextmanager
    def running(self, which: str) -> Iterator[None]:
        """A context around a pass; ``BEFORE`` starts anew, ``AFTER`` measures and may be
        repeated.
        """
        self._found, self._call, self._verdicts = [], None, []
        if which == BEFORE:
            self._old = {}
        self._pass = which
        try:
            yield
        finally:
            self._pass = None

    def _timed(self) -> AbstractContextManager[None]:
        # The pass after the step is timed as a whole.
        return self._timer.running() if self._pass == BEFORE else nullcontext()

    @torch.no_grad()
    def see_head(self, call: LMHeadCall, response: PackedResponse) -> None:
        """Take the LM head's call of the micro-batch that :meth:`see` gets next, in its layout.

        Its weight is read now.
        """
        with self._timed(), torch.autocast(response.response_mask.device.type, enabled=False):
            at, _ = _tokens(response)
            recomputed = (
                None
                if call.head is None
                else call.head.in_float32(call.hidden_states.flatten(0, -2)[at])
            )
        self._call = recomputed, call.output.flatten(0, -2)

    @torch.no_grad()
    def see(
        self, logits: Tensor | ProjectedLogits, hidden_states: Tensor | None, temperature: Tensor,
        response: PackedResponse, place: int
    ) -> None:  # fmt: skip
        """Take the logits of one micro-batch; in :meth:`running`.

        Args:
            logits: ``[b, s, rows]`` before temperature, this rank's rows; or the LM head, with the
                hidden states ``[b, s, H]``.
            temperature: ``[b, s]``
            response: in the same layout; its response mask holds the probed tokens.
            place: number of the micro-batch among those probed.
        """
        assert self._head is not None
        with self._timed(), torch.autocast(temperature.device.type, enabled=False):
            at, valid = _tokens(response)
            if isinstance(logits, ProjectedLogits):
                assert hidden_states is not None
                seen, usable = (
                    logits.in_float32(hidden_states.detach().flatten(0, -2)[at]),
                    valid.new_ones(()),
                )
            else:
                seen, usable = self._recomputed(logits.detach().flatten(0, -2), at)
            if not self._settled:
                self._verdicts.append(torch.stack((~usable & valid.any(), valid.sum())).double())
            if self._pass == BEFORE:
                self._old[place] = seen
                return
            # verl's own lower bound; at padding the temperature is 0.
            cooled = temperature.detach().flatten()[at].clamp(min=1e-8)
            old = self._old[place]
            kl = token_kl(old, seen, self._head.shard, self._head.tp_group, temperature=cooled)
            self._found.append((kl, valid))

    def _recomputed(self, logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[n, rows]`` of the tokens ``at``, and whether they are those of the model and
        not rounded by its LM head.
        """
        (recomputed, made), self._call = self._call or (None, None), None
        if recomputed is None or made is None:
            # A copy: the trainer goes on to overwrite the logits. Float32 ones were rounded if
            # their LM head is in half precision.
            whole = made is None and logits.dtype.itemsize >= 4
            return logits[at], torch.full((), whole, device=at.device)
        usable = recomputed.new_ones((), dtype=torch.bool)
        return recomputed, usable if self._settled else reproduces(recomputed, made, logits, at)

    def settle(self) -> bool:
        """Agree on all ranks if logits in half precision can be recomputed, once tokens were seen.

        Called after a pass ``BEFORE``; collective over all ranks until it is settled.

        Returns:
            True if what the pass kept is of no use: the following ones compare with something else.
        """
        if self._settled:
            return False
        seen = torch.stack(
            self._verdicts or [torch.zeros(2, device=self._device, dtype=torch.float64)]
        ).sum(0)
        wrong, tokens = collectives.sum_(seen, (dist.group.WORLD,)).tolist()
        self._settled, self._recomputes = tokens > 0, wrong == 0
        if wrong and (not dist.is_initialized() or dist.get_rank() == 0):
            logger.warning(ROUNDED)
        return wrong > 0

    @torch.no_grad()
    def _see_log_probs(
        self, model_output: dict[str, Tensor], data: TensorDict, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take one micro-batch's log-probabilities of the taken tokens, in the place of a loss."""
        if PROBED in data:
            place, _ = place_of(data)
            seen = _values(accepted_response(model_output["log_probs"].detach(), data))
            seen = seen[_values(data[PROBED])]
            if self._pass == BEFORE:
                self._old[place] = seen
            else:
                kl = k3(self._old[place], seen)
                self._found.append((kl, torch.full_like(kl, self._counts(), dtype=torch.bool)))
        return torch.zeros((), device=model_output["log_probs"].device), {}

    def _counts(self) -> bool:
        """True on one of the context-parallel ranks: the engines give every one all tokens."""
        assert self._head is not None
        return collectives.rank(self._head.cp_group) == 0

    @torch.no_grad()
    def result(self) -> MeasuredKL:
        """The measurement of the last pass.

        Collective over all ranks; waits for the device once.
        """
        values = [torch.zeros((), device=self._device)] * 3
        if self._head is not None:
            groups = (self._head.dp_group, self._head.cp_group)
            nothing = (
                torch.zeros(0, device=self._device),
                torch.zeros(0, device=self._device, dtype=torch.bool),
            )
            kl, valid = (torch.cat(x) for x in zip(*(self._found or [nothing]), strict=True))
            sums = torch.stack(
                (torch.where(valid, kl, 0.0).sum(dtype=torch.float64), valid.sum().double())
            )
            total, count = collectives.sum_(sums, groups).unbind()
            p99 = nearest_rank(ordered_keys(kl, valid)[None], count, (0.99,), groups)[0, 0]
            values = [total / count.clamp(min=1), p99, count]
        mean, nearly_worst, tokens = everywhere(values, self._head is not None)
        return MeasuredKL(mean, nearly_worst, int(tokens))


def everywhere(values: Sequence[Tensor], known: bool) -> list[float]:
    """The values of the ranks with ``known``, on every rank of the run; NaN if there is none.

    Collective, waits for the device once.

    Args:
        values: scalars, as many on every rank.
    """
    mine = torch.stack([torch.full_like(values[0], known).double(), *(x.double() for x in values)])
    table = collectives.gather(mine, dist.group.WORLD).view(-1, len(mine)).tolist()
    return next((row[1:] for row in table if row[0]), [math.nan] * len(values))


def place_of(batch: TensorDict) -> tuple[int, int]:
    """The number of a probed micro-batch among those, and of its probed tokens."""
    place, count = batch[PLACE]
    return int(place), int(count)


def _values(field: Tensor) -> Tensor:
    """``[R]``, of a nested or padded field."""
    return field.values() if field.is_nested else field.flatten()


def _tokens(response: PackedResponse) -> tuple[Tensor, Tensor]:
    """Places of the tokens of the response mask, and which of them are meant: on a GPU there may be
    more, as many as the host knows of.
    """
    mask = response.response_mask.flatten()
    if mask.device.type == "cpu":
        at = mask.nonzero()[:, 0]
        return at, torch.ones_like(at, dtype=torch.bool)
    size = min(response.max_tokens, len(mask))
    at = torch.nonzero_static(mask, size=size, fill_value=0)[:, 0]
    return at, torch.arange(size, device=mask.device) < mask.sum()
