# SPDX-License-Identifier: Apache-2.0
"""All sequences of some steps, with what the filter saw of each token, for ``capo-verl report``."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from capo_verl.experiments.study.pretrained.vocabulary import Vocabulary
from capo_verl.experiments.study.stepper import Seen
from capo_verl.viewer.samples import FILE
from capo_verl.viewer.token_text import token_pieces


class TokenRecords:
    """Appends to one file.

    Args:
        folder: of the run; what an earlier attempt left there goes.
        vocabulary: of the model.
        mode: of the filter.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, mode: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._vocabulary, self._mode = folder / FILE, vocabulary, mode
        self.path.unlink(missing_ok=True)

    def write(self, step: int, seen: Seen) -> None:
        """A line per sequence of an optimizer step."""
        assert seen.output is not None  # checked by the config
        mask = seen.rollout.mask
        lengths = mask.sum(-1).tolist()
        output = seen.output
        columns = {
            "probability": seen.log_prob[mask].exp(),
            "policy_shift": output.policy_shift,
            "objective_shift": output.objective_shift,
            "in_trust_region": output.in_trust_region.int(),
            "weight": seen.kept[mask].float() * output.weights,
        }
        rows = zip(*(x.split(lengths) for x in columns.values()), strict=True)
        prompt_length = seen.rollout.tokens.shape[1] - mask.shape[1]
        with self.path.open("a", encoding="utf-8") as file:
            for sample, (length, of_sample) in enumerate(zip(lengths, rows, strict=True)):
                tokens = seen.rollout.tokens[sample].tolist()
                prompt = [t for t in tokens[:prompt_length] if t != self._vocabulary.pad]
                ids = tokens[prompt_length : prompt_length + length]
                text = token_pieces([*prompt, *ids], self._vocabulary.decode)
                entry = {
                    "step": step, "sample": sample, "chosen": "first", "mode": self._mode,
                    "prompt": {"ids": prompt, "text": text[: len(prompt)]},
                    "response": {
                        "ids": ids, "text": text[len(prompt) :],
                        "advantage": [float(seen.rollout.advantages[sample])] * length,
                        "mask": [1] * length,
                        **{k: _plain(v) for k, v in zip(columns, of_sample, strict=True)},
                    },
                }  # fmt: skip
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _plain(values: Tensor) -> list[float]:
    """With the six digits that float32 has."""
    return [float(f"{value:.6g}") for value in values.tolist()]
