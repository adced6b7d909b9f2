# SPDX-License-Identifier: Apache-2.0
"""The KL divergence that an optimizer step causes, measured on some samples of its mini-batch.

Both are forward passes over the same samples, cut into the same micro-batches, so what the first
one saw and what the second one sees lie at the same places, in whatever layout the engine has. The
model is in evaluation mode in both: no dropout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from capo_verl.core import ProjectedLogits, collectives
from capo_verl.core.order_statistics import nearest_rank, ordered_keys
from capo_verl.core.token_kl import k3, token_kl
from capo_verl.engines.lm_head import LMHead, LMHeadCall, reproduces
from capo_verl.engines.response import SAMPLE, PackedResponse, accepted_response

logger = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"

ROUNDED = (
    "capo.kl_budget: the KL is measured from logits in half precision, because this model changes "
    "them after its LM head (soft-capping, scaling) or has adapters on it, and they cannot be "
    "computed again in float32. Their rounding inflates a small KL: a capo.kl_budget.delta below "
    "about 2e-3 may be out of reach, and the learning rate would fall to scale_min. Choose delta "
    "from capo/kl_mean of a run with delta=1e9, or set capo.kl_budget.estimator=k3"
)


class MeasuredKL(NamedTuple):
    """The KL divergence of one optimizer step, the same on all ranks of the run."""

    mean: float
    """Nats per response token."""
    p99: float
    tokens: int


def probe_samples(samples: int, share: float, multiple: int = 1) -> list[int]:
    """Indices of a rank's ``samples`` that are probed, evenly spread.

    At least one, and a multiple of ``multiple`` if there are as many.
    """
    count = max(1, math.ceil(samples * share - 1e-9))
    count = min(samples, -(-count // multiple) * multiple)
    return [i * samples // count for i in range(count)]


def probe_batch(data: TensorDict, share: float, groups_of_micro_batches: int = 1) -> TensorDict:
    """Some samples of a mini-batch as a batch of their own, for a forward pass without entropy or
    distillation.

    Args:
        data: this rank's share of the mini-batch, as verl's worker hands it to the engine.
        groups_of_micro_batches: the engine needs a multiple of so many micro-batches (interleaved
            pipelines).
    """
    # Here and not above: loading verl's engines loads ours.
    from verl.utils import tensordict_utils as tu

    # A micro-batch of verl's dynamic batching holds one sample or more; the others hold exactly so
    # many.
    dynamic = tu.get_non_tensor_data(data, key="use_dynamic_bsz", default=True)
    micro_batch = (
        1 if dynamic else tu.get_non_tensor_data(data, key="micro_batch_size_per_gpu", default=1)
    )
    at = probe_samples(len(data), share, micro_batch * groups_of_micro_batches)
    probe = tu.index_select_tensor_dict(data, at)
    tu.maybe_fix_3d_position_ids(probe)
    off = dict.fromkeys(
        ("calculate_entropy", "calculate_sum_pi_squared", "distillation_use_topk"), False
    )
    tu.assign_non_tensor(probe, force_group_size=1, **off)
    probe[SAMPLE] = torch.arange(len(at), device=probe.device)
    return probe


class KLProbe:
    """Collects what the passes see on this rank.

    Args:
        head: None on a rank without LM head, which only learns the result.
        estimator: ``exact`` keeps the old policy's logits of the probed tokens, ``k3`` the
            log-probabilities. Logits in half precision are replaced by the same product in float32,
            unless the model changes them after its LM head.
        device: where the training runs.
    """

    def __init__(self, head: LMHead | None, estimator: str, device: torch.device):
        self._head, self._estimator, self._device = head, estimator, device
        self._pass: str | None = None
        self._recomputes = True
        """True if logits in half precision are replaced.

        Until it is settled, each micro-batch says if they can be.
        """
        self._settled = estimator != "exact"
        self.discard()

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
        """The loss function of the forward passes: with ``k3`` it picks up the
        log-probabilities.
        """
        return self._see_log_probs if self._estimator == "k3" else None

    def discard(self) -> None:
        """Forget the old policy, and what was measured."""
        self._old: list[Tensor] = []
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
            self._old = []
        self._pass = which
        try:
            yield
        finally:
            self._pass = None

    @torch.no_grad()
    def see_head(self, call: LMHeadCall, response: PackedResponse) -> None:
        """Take the LM head's call of the micro-batch that :meth:`see` gets next, in its layout.

        Its weight is read now.
        """
        at, _ = _tokens(response)
        with torch.autocast(at.device.type, enabled=False):
            recomputed = (
                None
                if call.head is None
                else call.head.in_float32(call.hidden_states.flatten(0, -2)[at])
            )
        self._call = recomputed, call.output.flatten(0, -2)

    @torch.no_grad()
    def see(
        self, logits: Tensor | ProjectedLogits, hidden_states: Tensor | None, temperature: Tensor,
        response: PackedResponse
    ) -> None:  # fmt: skip
        """Take the logits of one micro-batch, in the order in which they run; in :meth:`running`.

        Args:
            logits: ``[b, s, rows]`` before temperature, this rank's rows; or the LM head, with the
                hidden states ``[b, s, H]``.
            temperature: ``[b, s]``
            response: in the same layout.
        """
        assert self._head is not None
        at, valid = _tokens(response)
        with torch.autocast(at.device.type, enabled=False):
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
                self._old.append(seen)
                return
            # verl's own lower bound; at padding the temperature is 0.
            cooled = temperature.detach().flatten()[at].clamp(min=1e-8)
            old = self._old[len(self._found)]
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
            True if the pass has to be repeated: the following ones compare with something else.
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
        seen = _response_values(model_output["log_probs"], data)
        if self._pass == BEFORE:
            self._old.append(seen)
        else:
            self._found.append((k3(self._old[len(self._found)], seen), self._counted(data)))
        return torch.zeros((), device=seen.device), {}

    def _counted(self, data: TensorDict) -> Tensor:
        """``[R]`` bool: the tokens of the response mask.

        The engines give every context-parallel rank all of them: one counts.
        """
        assert self._head is not None
        mask = data["response_mask"]
        mask = (mask.values() if mask.is_nested else mask.flatten()).bool()
        return mask if collectives.rank(self._head.cp_group) == 0 else torch.zeros_like(mask)

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


def _tokens(response: PackedResponse) -> tuple[Tensor, Tensor]:
    """Places of the tokens of the response mask, and which of them are meant: on a GPU there are
    more, known from shapes.
    """
    mask = response.response_mask.flatten()
    if mask.device.type == "cpu":
        at = mask.nonzero()[:, 0]
        return at, torch.ones_like(at, dtype=torch.bool)
    size = min(response.max_tokens, len(mask))
    at = torch.nonzero_static(mask, size=size, fill_value=0)[:, 0]
    return at, torch.arange(size, device=mask.device) < mask.sum()


def _response_values(values: Tensor, data: TensorDict) -> Tensor:
    """``[R]``, of per-token results at the positions before the tokens', nested ``[b, prompt +
    response]``.
    """
    responses = accepted_response(values.detach(), data)
    return responses.values() if responses.is_nested else responses.flatten()
