# SPDX-License-Identifier: Apache-2.0
"""The text of single tokens, such that the pieces joined are the text of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 4
"""Tokens decoded before a piece.

A tokenizer may drop a space at the start of a text, not within one.
"""
LONGEST = 8
"""So many tokens at most make up one character."""
UNFINISHED = "\ufffd"


def token_pieces(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """One text per token.

    A character that several tokens share belongs to the last of them, the others are empty; bytes
    that never become a character are shown as U+FFFD.

    Args:
        ids: token ids, in order.
        decode: of a tokenizer: ids to text, special tokens included.

    Returns:
        As many strings as ids.
    """
    ids, pieces, start = list(ids), [""] * len(ids), 0
    while start < len(ids):
        before = ids[max(0, start - CONTEXT) : start]
        prefix = decode(before) if before else ""
        for end in range(start + 1, min(start + LONGEST, len(ids)) + 1):
            piece = _piece(ids, start, end, prefix, before, decode)
            if not piece.endswith(UNFINISHED):
                break
        if UNFINISHED in piece and end > start + 1:  # no character begins here
            end = start + 1
            piece = _piece(ids, start, end, prefix, before, decode)
        pieces[end - 1] = piece
        start = end
    return pieces


def _piece(
    ids: list[int],
    start: int,
    end: int,
    prefix: str,
    before: list[int],
    decode: Callable[[list[int]], str],
) -> str:
    text = decode(before + ids[start:end])
    # A tokenizer which rewrites what it has decoded before gives the piece on its own.
    return text[len(prefix) :] if text.startswith(prefix) else decode(ids[start:end])
