# SPDX-License-Identifier: Apache-2.0
"""Moments that are written by an engine, damaged, and read again: what the tests of damage run on
gloo ranks.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.state_cases import new_engine

STEP, VOCAB, HIDDEN = 2, 128, 64
HEADER = struct.pack("<3q", STEP, VOCAB, HIDDEN)
"""As Megatron's file holds it."""
MEMORY = 4 << 30
"""Bytes that reading a damaged file may ask for."""

State = dict[str, Any]


def make_state(engine: Any) -> State:
    """This rank's rows of moments that are the same in every layout; empty without LM head."""
    head = engine.lm_head
    if head is None:
        return {}
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    first, second = whole[:, head.shard.start : head.shard.start + head.shard.rows].unbind()
    return {"exp_avg": first, "exp_avg_sq": second.square(), "step": STEP}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        for name in a
    )


def save(layout: Layout | FsdpLayout, model: str, checkpoint: str) -> None:
    engine = new_engine(layout, model)
    engine._save_state(checkpoint, make_state(engine))


def outcome(engine: Any, checkpoint: str) -> str:
    """``same`` if what was saved is loaded, or the sentence that refuses it."""
    try:
        loaded = engine._load_state(checkpoint)
    except RuntimeError as e:
        return str(e)
    if loaded is None:
        return "none"
    return "same" if equal(loaded, make_state(engine)) else f"loads something else: {loaded}"


def outcomes(
    layout: Layout | FsdpLayout, model: str, checkpoints: list[str]
) -> list[tuple[str, str]]:
    """Per checkpoint the outcome on this rank, and what was warned of."""
    engine, said = new_engine(layout, model), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("capo_verl").addHandler(handler)
    found = []
    for checkpoint in checkpoints:
        said.clear()
        found.append((outcome(engine, checkpoint), " ".join(said)))
    return found


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """A context in which this process may have no more than ``limit`` of a resource."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def saves_without_room(
    layout: Layout | FsdpLayout, model: str, folder: str, rank: int
) -> dict[str, str]:
    """What saving says where ``rank`` can write no file of more than a kilobyte, what is left of
    the checkpoint that was there, and whether the next attempt with room succeeds.
    """
    engine = new_engine(layout, model)
    state = make_state(engine)
    engine._save_state(folder, state)
    files = sorted(Path(folder, "capo").rglob("*"))
    result = {}
    room = 1024 if dist.get_rank() == rank else resource.RLIM_INFINITY
    try:
        with limited(resource.RLIMIT_FSIZE, room):
            engine._save_state(folder, {**state, "step": STEP + 1} if state else {})
        result["said"] = "saved"
    except RuntimeError as e:
        result["said"] = str(e)
    dist.barrier()
    result["left"] = str(sorted(Path(folder, "capo").rglob("*")) == files)
    result["before"] = outcome(engine, folder)
    engine._save_state(folder, state)
    result["again"] = outcome(engine, folder)
    return result


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_header(checkpoint: Path, number: int, bit: int) -> None:
    """Flip a bit of the step (0), vocabulary (1) or hidden size (2) in Megatron's files."""
    (path,) = (p for p in checkpoint.rglob("*.distcp") if HEADER in p.read_bytes())
    assert path.read_bytes().count(HEADER) == 1
    flip(path, 8 * (path.read_bytes().index(HEADER) + 8 * number) + bit)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, int]:
    """A kind of damage, which file, and where: a share of its size."""
    kind = draw(st.sampled_from(["bit", "bit", "bit", "cut", "zero", "append", "swap", "gone"]))
    return kind, draw(st.integers(0, 1 << 16)), draw(st.integers(0, (1 << 32) - 1))


def damage(folder: Path, other: Path, kind: str, which: int, at: int) -> None:
    """Do it to one of the files of ``folder``; ``swap`` takes a file of ``other``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[which % len(files)]
    data = path.read_bytes()
    place = at * len(data) >> 32
    if kind == "bit":
        flip(path, at * len(data) * 8 >> 32)
    elif kind == "cut":
        path.write_bytes(data[:place])
    elif kind == "zero":
        path.write_bytes(data[:place] + bytes(len(data) - place))
    elif kind == "append":
        path.write_bytes(data + data[:place])
    elif kind == "swap":
        path.write_bytes((other / path.relative_to(folder)).read_bytes())
    else:
        path.unlink()


def fuzz(
    layout: Layout | FsdpLayout, model: str, folder: str, examples: int, first: int | None
) -> int:
    """Damage a checkpoint ``examples`` times; what loads must equal what was saved.

    Args:
        first: seed; None = the same examples every time.

    Returns:
        How many damaged ones loaded.
    """
    engine, loaded = new_engine(layout, model), 0
    saved, other, copy = (Path(folder, name) for name in ("saved", "other", "copy"))
    state = make_state(engine)
    engine._save_state(str(saved), state)
    engine._save_state(str(other), {**state, "exp_avg": -state["exp_avg"], "step": 7})

    def check(way: tuple[str, int, int]) -> None:
        nonlocal loaded
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        damage(copy, other, *way)
        if way[0] == "swap" and len(list(copy.rglob("*.*"))) == 1:
            return  # that is a checkpoint of its own
        said = outcome(engine, str(copy))
        loaded += said == "same"
        assert said == "same" or is_refusal(said, copy), said

    run: Callable[[], None] = given(way=damages())(check)
    run = settings(
        max_examples=examples, deadline=None, database=None, derandomize=first is None,
        suppress_health_check=list(HealthCheck),
    )(run if first is None else seed(first)(run))  # fmt: skip
    with limited(resource.RLIMIT_AS, _address_space() + MEMORY):
        run()
    return loaded


def is_refusal(said: str, checkpoint: Path) -> bool:
    """One sentence that names the state, and does not hand on torch's advice."""
    return (
        said.startswith(f"the CAPO state in {checkpoint}/capo/")
        and "cannot be used (" in said
        and "\n" not in said
        and "weights_only" not in said
    )


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")
