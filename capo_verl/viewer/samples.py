# SPDX-License-Identifier: Apache-2.0
"""Sequences that the trainer sampled (``capo.sample_tokens_every``), read from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo_verl.viewer.token_text import token_pieces

FILE = "capo_tokens.jsonl"
"""File name in a run's checkpoint folder; :mod:`capo_verl.engines.token_samples` writes it."""
COLUMNS = (
    "ids",
    "advantage",
    "mask",
    "probability",
    "policy_shift",
    "objective_shift",
    "in_trust_region",
    "weight",
)
FOLDERS = (
    "actor_rollout_ref.actor.policy_loss.capo.sample_tokens_dir",
    "trainer.default_local_dir",
)


def is_samples_file(path: Path) -> bool:
    return path.name.startswith(Path(FILE).stem) and path.suffix == ".jsonl"


def find_samples(folder: Path, config: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Path of the samples of the run whose log lies in ``folder``.

    They are there, in ``checkpoints``, or where its configuration says.
    """
    told = [(config or {}).get(key) for key in FOLDERS]
    places = [
        folder,
        folder / "checkpoints",
        *(Path(place) for place in told if isinstance(place, str) and place),
    ]
    for place in places:
        if (place / FILE).is_file():
            return read_samples(place / FILE)
    return []


def read_samples(path: Path) -> list[dict[str, Any]]:
    """All sequences by step, in the order in which they were written.

    Of a step that a resumed run repeated, the later ones stay.

    Raises:
        ValueError: naming the line that is none.
    """
    by_step: dict[int, dict[int, dict[str, Any]]] = {}
    # Not splitlines, which would split at U+2028 in a text.
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            lengths = {len(entry["response"][name]) for name in COLUMNS}
            if len(lengths) != 1:
                raise ValueError("columns of different lengths")
            step, sample = int(entry["step"]), int(entry["sample"])
            entry["prompt"]["ids"]  # noqa: B018  must be there
        except (ValueError, KeyError, TypeError) as e:
            if number == len(lines):
                break  # still being written
            raise ValueError(
                f"{path}, line {number}: not a token sample ({type(e).__name__}: {e}); remove the "
                "line"
            ) from e
        by_step.setdefault(step, {})[sample] = entry
    return [entry for step in sorted(by_step) for entry in by_step[step].values()]


def put_into_text(samples: list[dict[str, Any]], tokenizer: Any) -> None:
    """Fill ``text`` in place with a Hugging Face tokenizer, also where the trainer wrote one."""

    def decode(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    for entry in samples:
        prompt, response = entry["prompt"], entry["response"]
        pieces = token_pieces([*prompt["ids"], *response["ids"]], decode)
        prompt["text"], response["text"] = (
            pieces[: len(prompt["ids"])],
            pieces[len(prompt["ids"]) :],
        )
