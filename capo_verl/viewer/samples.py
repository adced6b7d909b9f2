# SPDX-License-Identifier: Apache-2.0
"""Sequences that the trainer sampled (``capo.sample_tokens_every``), read from its files."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo_verl.viewer.notes import Damaged, DamagedLines, reason, shorten
from capo_verl.viewer.series import LARGEST, step_number
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
MOST_TOKENS = 2**31
"""Token ids are below: tokenizers keep them in 32 bits."""
FOLDERS = (
    "actor_rollout_ref.actor.policy_loss.capo.sample_tokens_dir",
    "trainer.default_local_dir",
)


def is_samples_file(path: Path) -> bool:
    return path.name.startswith(Path(FILE).stem) and path.suffix == ".jsonl"


def find_samples(
    folder: Path, config: Mapping[str, Any] | None, notes: list[str]
) -> list[dict[str, Any]]:
    """Samples of the run whose log lies in ``folder``.

    They are there, in ``checkpoints``, or where its configuration says, which is noted. A damaged
    line is left out, with a note.
    """
    told = [(config or {}).get(key) for key in FOLDERS]
    places = [folder, folder / "checkpoints", *(Path(p) for p in told if isinstance(p, str) and p)]
    for number, place in enumerate(places):
        path = place / FILE
        try:
            if not path.is_file():
                continue
            damaged = DamagedLines(path)
            found = read_samples(path, damaged)
        except (OSError, ValueError) as e:  # no path at all, say
            notes.append(
                f"samples of {folder} cannot be read from {shorten(str(path))} ({reason(e)})"
            )
            continue
        notes.extend(damaged.notes())
        if number > 1:
            notes.append(f"samples of {folder} are those of {path}, which its configuration names")
        return found
    return []


def read_samples(path: Path, damaged: Damaged | None = None) -> list[dict[str, Any]]:
    """All sequences by step, in the order in which they were written.

    Of a step that a resumed run repeated, the later ones stay. A number that is NaN or infinite is
    None.

    Args:
        damaged: called for each line that is none, which is left out.

    Raises:
        ValueError: naming the line that is none, without ``damaged``.
    """
    by_step: dict[int, dict[int, dict[str, Any]]] = {}
    # Not splitlines, which would split at U+2028 in a text.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _sample(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            if number == len(lines):
                break  # still being written
            why = f"not a token sample ({reason(e)})"
            if damaged is None:
                raise ValueError(f"{path}, line {number}: {why}; remove the line") from e
            damaged(number, why)
            continue
        by_step.setdefault(entry["step"], {})[entry["sample"]] = entry
    return [entry for step in sorted(by_step) for entry in by_step[step].values()]


def _sample(entry: Any) -> dict[str, Any]:
    """The fields of docs/viewer.md, and no others.

    Raises:
        ValueError, KeyError, TypeError: if one is missing or of another kind.
    """
    prompt, response = entry["prompt"], entry["response"]
    numbers = {name: [_number(value) for value in response[name]] for name in COLUMNS[1:]}
    ids = _ids(response)
    if any(len(column) != len(ids) for column in numbers.values()):
        raise ValueError("columns of different lengths")
    return {
        "step": step_number(entry["step"]),
        "sample": step_number(entry["sample"], "sample"),
        "chosen": str(entry.get("chosen", "")),
        "mode": str(entry.get("mode", "")),
        "prompt": {"ids": (before := _ids(prompt)), "text": _text(prompt, len(before))},
        "response": {"ids": ids, "text": _text(response, len(ids)), **numbers},
    }


def _ids(tokens: Any) -> list[int]:
    for token in tokens["ids"]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MOST_TOKENS:
            raise ValueError(f"{reprlib.repr(token)} is no token id")
    return list(tokens["ids"])


def _text(tokens: Any, length: int) -> list[str] | None:
    text = tokens.get("text")
    if text is None:
        return None
    if len(text) != length or not all(isinstance(piece, str) for piece in text):
        raise ValueError("text and ids of different lengths")
    return list(text)


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, int | float):
        return value if value is not None and abs(value) <= LARGEST else None
    raise ValueError(f"{reprlib.repr(value)} is no number")


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
