# SPDX-License-Identifier: Apache-2.0
"""The step that the optimizer makes of a gradient of the LM head: ``P(g)`` per learning rate.

``sgd``: ``P(g) = g``. ``adam``: row-wise first and second moments of the mean accepted gradient,
    kept beside the real
optimizer's. All tensors hold this rank's vocabulary rows only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from capo_verl.config.checks import is_number
from capo_verl.core import collectives
from capo_verl.core.accepted import AcceptedTokens
from capo_verl.core.kernels import Kernels, plain
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.logits import FLOATS, VocabShard
from capo_verl.core.support import Support
from capo_verl.core.validation import is_count, shown


class SgdModel:
    """``P(g) = g``. Nothing to remember."""

    dtype = torch.float32

    def promote(self, dtype: torch.dtype) -> None:
        self.dtype = torch.promote_types(self.dtype, dtype)

    def move(self, device: torch.device) -> None:
        pass

    @property
    def is_settled(self) -> bool:
        """True once P(g) is on the scale that it keeps."""
        return True

    def gradient_limit(self, dtype: torch.dtype) -> float:
        """The largest gradient that can be squared."""
        return largest_square(dtype)

    def partial_sums(
        self, hidden: Tensor, advantages: Tensor, support: Support, directions: Tensor | None = None
    ) -> Tensor:
        return plain.identity_sums(hidden, advantages, support, directions)

    def check(self) -> None:
        pass

    def accumulate(
        self, hidden: Tensor, advantages: Tensor, support: Support, accepted: Tensor
    ) -> None:
        pass

    def discard(self) -> None:
        pass

    def update(self, groups: Sequence[collectives.Group]) -> None:
        pass

    def precondition(self, rows: Tensor, gradient: Tensor, columns: slice) -> Tensor:
        return gradient

    def state_dict(self) -> dict[str, Any]:
        return {}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, Mapping) or state:
            raise ValueError(
                f"optimizer_model='sgd' has no state, but the checkpoint holds {shown(state)}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state_dict(state)


class AdamModel:
    """Row-wise Adam moments of the LM head's policy gradient.

    Args:
        moments_dtype: in which the moments are stored; the arithmetic is float32.

    Attributes:
        exp_avg, exp_avg_sq: ``[rows, H]``, M and Q; float64 once float64 inputs were seen, unless
            stored in bfloat16.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        shard: VocabShard,
        hidden_size: int,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
        moments_dtype: torch.dtype,
        kernels: Kernels,
    ):
        self.shard, self.betas, self.eps = shard, betas, eps
        shape = (shard.rows, hidden_size)
        self.exp_avg = torch.zeros(shape, device=device, dtype=moments_dtype)
        self.exp_avg_sq = torch.zeros(shape, device=device, dtype=moments_dtype)
        self.dtype = torch.float32
        self._kernels = kernels
        # On the device, so that whether any token was accepted need not be known on the host.
        self._steps = torch.zeros((), device=device, dtype=torch.int64)
        self._accepted = AcceptedTokens(shard.rows, hidden_size, device, self.dtype, kernels)

    @property
    def step_count(self) -> int:
        """n, the number of updates so far. Waits for the device."""
        return int(self._steps)

    @property
    def moments(self) -> Moments:
        return Moments(
            self.exp_avg, self.exp_avg_sq, self._steps, self.betas, self.eps, self.shard.start
        )

    def promote(self, dtype: torch.dtype) -> None:
        """Widen the arithmetic if ``dtype`` is wider: float64 inputs are evaluated in float64."""
        if torch.promote_types(self.dtype, dtype) != self.dtype:
            self.dtype = dtype
            self._accepted.move(dtype=dtype)
            stored = self._stored(dtype)
            self.exp_avg, self.exp_avg_sq = self.exp_avg.to(stored), self.exp_avg_sq.to(stored)

    def move(self, device: torch.device) -> None:
        """Move everything to ``device``."""
        self.exp_avg, self.exp_avg_sq = self.exp_avg.to(device), self.exp_avg_sq.to(device)
        self._steps = self._steps.to(device)
        self._accepted.move(device)

    @property
    def is_settled(self) -> Tensor:
        """Scalar bool, False before the first update: until then ``P(g) = g``, which is on another
        scale.
        """
        return self._steps > 0

    def partial_sums(
        self, hidden: Tensor, advantages: Tensor, support: Support, directions: Tensor | None = None
    ) -> Tensor:
        """``u_a``, ``sum pi u``, ``sum pi u^2`` of every token over this rank's rows: ``[N, 3]``.

        Args:
            directions: if given, ``[N, entries]``, filled with ``u`` of every entry of the support,
                0 for other ranks' rows.
        """
        return self._kernels.partial_sums(hidden, advantages, support, self.moments, directions)

    def precondition(self, rows: Tensor, gradient: Tensor, columns: slice) -> Tensor:
        """``P(g)`` elementwise, with the moments after this gradient.

        Args:
            rows: ``[P]`` int64, row of each gradient.
            gradient: ``[P, c]``, its columns ``columns`` of H.
        """
        old1, new1, old2, new2 = self.moments.corrected((self._steps + 1).double())
        dtype = gradient.dtype
        first = old1.to(dtype) * self.exp_avg[rows, columns].to(dtype) + new1.to(dtype) * gradient
        second = (
            old2.to(dtype) * self.exp_avg_sq[rows, columns].to(dtype) + new2.to(dtype) * gradient**2
        )
        return torch.where(self._steps == 0, gradient, first.div_(second.sqrt_().add_(self.eps)))

    def gradient_limit(self, dtype: torch.dtype) -> float:
        """The largest gradient whose square the moments hold, with arithmetic in ``dtype``."""
        stored = self.exp_avg.dtype
        return largest_square(stored if stored == torch.bfloat16 else dtype)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if hidden states were overwritten since they were evaluated.
        """
        self._accepted.check()

    def accumulate(
        self, hidden: Tensor, advantages: Tensor, support: Support, accepted: Tensor
    ) -> None:
        """Remember the accepted tokens for the update.

        Args:
            hidden: ``[N, H]``, kept by reference; advantages: ``[N]``; accepted: ``[N]`` bool.
        """
        self._accepted.add(hidden, advantages, support, accepted)

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self._accepted.clear()

    def update(self, groups: Sequence[collectives.Group]) -> None:
        """Move the moments by the mean accepted gradient of the mini-batch; rows without one keep
        their values.

        Without any accepted token nothing changes, the number of updates neither.

        Args:
            groups: data- and context-parallel groups over which the accepted tokens are spread.

        Raises:
            RuntimeError: as :meth:`check`; nothing is changed then.
        """
        self.check()
        self._accepted.update(self.moments, groups)
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step_count}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: for missing or unexpected keys, other shapes or dtypes, values that are not
                finite in this model's dtype, or a step that is no count.
        """
        expected = ("exp_avg", "exp_avg_sq", "step")
        if not isinstance(state, Mapping) or set(state) != set(expected):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else state
            raise ValueError(f"CAPO state holds {shown(found)}, expected {sorted(expected)}")
        step = state["step"]
        if is_number(step) and step < 0:
            raise ValueError(f"CAPO state: step={step} is negative")
        if not is_count(step):
            raise ValueError(f"CAPO state: step={shown(step)}, expected an integer in 0..2^53")
        for name in expected[:2]:
            value, shape = state[name], self.exp_avg.shape
            if (
                not isinstance(value, Tensor)
                or value.dtype not in FLOATS
                or value.layout != torch.strided
                or value.is_meta
            ):
                raise ValueError(
                    f"CAPO state: {name}={shown(value)}, expected a float tensor {list(shape)}"
                )
            if value.shape != shape:
                raise ValueError(
                    f"CAPO state: {name} has shape {tuple(value.shape)}, this rank needs "
                    f"{tuple(shape)}"
                )
            stored = self._stored(torch.promote_types(state["exp_avg"].dtype, torch.float32))
            if not value.to(stored).isfinite().all():
                raise ValueError(
                    f"CAPO state: {name} holds non-finite values; the checkpoint is corrupt"
                )
        if (state["exp_avg_sq"] < 0).any():
            raise ValueError(
                "CAPO state: exp_avg_sq holds negative values; the checkpoint is corrupt"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved moments.

        Raises:
            ValueError: as :meth:`check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self.promote(torch.promote_types(state["exp_avg"].dtype, torch.float32))
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        self._steps.fill_(int(state["step"]))
        self.discard()

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the moments once ``dtype`` was promoted."""
        now = self.exp_avg.dtype
        return now if now == torch.bfloat16 else torch.promote_types(now, dtype)


def largest_square(dtype: torch.dtype) -> float:
    """A number whose square, and four times that, ``dtype`` holds."""
    return math.sqrt(torch.finfo(dtype).max) / 2


OptimizerModel = AdamModel | SgdModel
