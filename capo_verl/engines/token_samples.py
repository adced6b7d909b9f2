# SPDX-License-Identifier: Apache-2.0
"""A few sequences of the training batch, with what the filter saw of each token, written for
``capo-verl report``.

One process of the run writes: the first of the data-, tensor- and context-parallel groups on the
last pipeline stage. The file lies in the run's checkpoint folder, which every node of a run can
write to anyway. Steps that are not sampled do nothing here.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter, CapoOutput, collectives
from capo_verl.engines.response import SAMPLE, next_token_fields
from capo_verl.viewer.samples import FILE
from capo_verl.viewer.token_text import token_pieces

logger = logging.getLogger(__name__)

FILTER_COLUMNS = ("policy_shift", "objective_shift", "in_trust_region", "weights")
"""The fields of :class:`~capo_verl.core.output.CapoOutput` that are kept."""


class TokenSamples:
    """Collects sequences during one optimizer step and writes them when it is made.

    Half of the ``capo.sample_tokens`` sequences are the first of this rank's mini-batch, the others
    those of the rest with most tokens outside the trust region (``chosen`` says which). With
    several mini-batches a training step, the first is sampled.

    Args:
        config: ``sample_tokens_every``, ``sample_tokens``, ``sample_tokens_dir``.
        capo: the filter, for its process groups.
    """

    tokenizer: Any = None
    """Writes the text beside the ids, if there is one."""

    def __init__(self, config: CapoConfig, capo: CapoFilter):
        self._config = config
        # The ranks of a tensor- or context-parallel group see the same sequences, and put them
        # together in a collective.
        self._participates = (
            config.sample_tokens_every is not None and collectives.rank(capo.dp_group) == 0
        )
        self._writes = collectives.rank(capo.tp_group) == 0 and collectives.rank(capo.cp_group) == 0
        self._step: int | None = None
        self._sampled_step: int | None = None
        self._columns: Tensor | None = None
        self.active = False
        """True if the optimizer step in progress is sampled."""
        self.discard()

    def begin(self, step: int) -> None:
        """Begin an optimizer step, after ``step`` training steps."""
        every = self._config.sample_tokens_every
        due = every is not None and step % every == 0
        self.active = self._participates and due and step != self._sampled_step
        self._step = step

    def discard(self) -> None:
        """Forget what was collected since the last step."""
        self._first: list[dict[str, Any]] = []
        self._others: list[dict[str, Any]] = []

    def keep(self, out: CapoOutput) -> None:
        """Keep the filter's findings in a micro-batch until :meth:`add`.

        Does not wait for the device.
        """
        if self.active:
            self._columns = torch.stack(
                [getattr(out, name).float() for name in FILTER_COLUMNS], dim=-1
            )

    def lay_out(self, to_sequences: Callable[[Tensor], Tensor]) -> None:
        """Bring what was kept from the layout of the model into that of ``input_ids``.

        Args:
            to_sequences: ``[b, s]`` as evaluated to flat ``[total]`` values at the position before
                the token's own, those of all context-parallel ranks (a collective).
        """
        if self.active and self._columns is not None:
            self._columns = torch.stack(
                [to_sequences(column.contiguous()) for column in self._columns.unbind(-1)], dim=-1
            )

    @torch.no_grad()
    def add(self, log_probs: Tensor | None, data: TensorDict) -> None:
        """Choose from a micro-batch. Waits for the device, in sampled steps only.

        Args:
            log_probs: nested ``[b, j]`` at the position before the token's own, at the rollout's
                temperature; None = unknown.
            data: the micro-batch, with nested ``input_ids`` and
                :data:`~capo_verl.engines.response.SAMPLE`.
        """
        columns, self._columns = self._columns, None
        if not (self.active and self._writes) or columns is None:
            return
        input_ids, fields = data["input_ids"], next_token_fields(data)
        log_prob = (
            torch.full_like(fields[:, 0], math.nan)
            if log_probs is None
            else log_probs.detach().values().float()
        )
        table = torch.cat([fields[:, :2], log_prob.exp()[:, None], columns], dim=-1).cpu()
        ids, samples = input_ids.values().cpu(), data[SAMPLE].cpu().tolist()
        bounds = input_ids.offsets().cpu().tolist()
        for sample, start, end in zip(samples, bounds, bounds[1:], strict=False):
            self._choose({"sample": sample, "ids": ids[start:end], "table": table[start : end - 1]})

    def _choose(self, sequence: dict[str, Any]) -> None:
        total = self._config.sample_tokens
        first = (total + 1) // 2
        mask, inside = sequence["table"][:, 1] > 0.5, sequence["table"][:, 5] > 0.5
        sequence["rejected"] = int((mask & ~inside).sum())
        if len(self._first) < first:
            self._first.append(sequence)
        elif total > first:
            self._others = sorted([*self._others, sequence], key=lambda s: -s["rejected"])[
                : total - first
            ]

    def write(self) -> None:
        """The optimizer step is made: append its sequences to the file.

        What cannot be written is a warning, once.
        """
        if not self.active:
            return
        # On every rank, whether it writes or not: all must agree about the next step's collectives.
        self._sampled_step, self.active = self._step, False
        if not self._first:
            return
        lines = [self._line(sequence, "first") for sequence in self._first]
        lines += [self._line(sequence, "most_rejected") for sequence in self._others]
        folder = Path(self._config.sample_tokens_dir or ".")
        try:
            if "://" in str(self._config.sample_tokens_dir):
                raise OSError("not a local folder")
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / FILE).open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
        except OSError as e:
            self._writes = False  # the others of its groups go on with their collectives
            logger.warning(
                "no more token samples: %s cannot be written (%s); set capo.sample_tokens_dir",
                folder / FILE,
                e,
            )
        self.discard()

    def _line(self, sequence: dict[str, Any], chosen: str) -> str:
        table, ids = sequence["table"], sequence["ids"].tolist()
        inside = (table[:, 1] > 0.5).nonzero().flatten().tolist()
        start = inside[0] + 1 if inside else len(ids)  # row t is about token t + 1
        end = inside[-1] + 2 if inside else len(ids)
        text = None if self.tokenizer is None else token_pieces(ids[:end], self._decode)
        rows = table[start - 1 : end - 1]
        names = (
            "advantage",
            "mask",
            "probability",
            "policy_shift",
            "objective_shift",
            "in_trust_region",
            "weight",
        )
        columns: dict[str, list[Any]] = {
            name: [_plain(value) for value in column.tolist()]
            for name, column in zip(names, rows.unbind(-1), strict=True)
        }
        for name in ("mask", "in_trust_region"):
            columns[name] = [int(value or 0) for value in columns[name]]
        entry = {
            "step": (self._step or 0) + 1,
            "sample": sequence["sample"],
            "chosen": chosen,
            "mode": self._config.mode,
            "prompt": {"ids": ids[:start], "text": text and text[:start]},
            "response": {"ids": ids[start:end], "text": text and text[start:], **columns},
        }
        return json.dumps(entry, allow_nan=False, ensure_ascii=False)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _plain(value: float) -> float | None:
    """With the six digits that float32 has; None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
