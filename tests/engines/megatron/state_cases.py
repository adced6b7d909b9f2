# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a CAPO run on one rank, of any engine: what the tests of its state run on gloo
ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cpu.fsdp.engine_cases import FsdpLayout, make_fsdp_engine
from tests.cpu.megatron.engine_cases import Layout, export, make_engine
from tests.engines.megatron.capo_cases import KNOBS, LR, make_batch, make_loss, moments


def step(engine: Any, knobs: dict[str, Any] | None = KNOBS) -> dict[str, Any]:
    """One optimizer step; CAPO's metrics, where this rank reports any."""
    with engine.train_mode():
        output = engine.train_batch(make_batch(engine, 1.0), make_loss("capo", knobs))
    metrics = output["metrics"] if engine.is_mp_src_rank_with_outputs() else {}
    return {k: v for k, v in metrics.items() if k.startswith("capo/") and "seconds" not in k}


def new_engine(layout: Layout | FsdpLayout, model_path: str) -> Any:
    if isinstance(layout, FsdpLayout):
        return make_fsdp_engine(layout, model_path, optimizer="AdamW", lr=LR)
    # Without it, Megatron's distributed optimizer is bound to the tensor- and pipeline-parallel
    # sizes under which it was saved.
    return make_engine(
        layout, model_path, optimizer="adam", lr=LR, dist_ckpt_optim_fully_reshardable=True
    )


def save_and_go_on(
    layout: Layout | FsdpLayout,
    model_path: str,
    checkpoint: str,
    knobs: dict[str, Any] | None = KNOBS,
) -> dict[str, Any]:
    """Two steps and a checkpoint, then one more step without interruption."""
    engine = new_engine(layout, model_path)
    for _ in range(2):
        step(engine, knobs)
    engine.save_checkpoint(checkpoint, global_step=2)
    saved = moments(engine)
    return {
        "saved": saved,
        "metrics": step(engine, knobs),
        "moments": moments(engine),
        "weights": export(engine),
    }


def resume(
    layout: Layout | FsdpLayout,
    model_path: str,
    checkpoint: str,
    knobs: dict[str, Any] | None = KNOBS,
    scale: float = 1.0,
) -> dict[str, Any]:
    """A fresh engine, the checkpoint, and the step after it, at ``scale`` times the learning
    rate.
    """
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("capo_verl").addHandler(handler)
    engine = new_engine(layout, model_path)
    engine.load_checkpoint(checkpoint, del_local_after_load=False)
    for group in engine.optimizer.param_groups:
        group["lr"] *= scale
    metrics = step(engine, knobs)
    return {
        "metrics": metrics,
        "moments": moments(engine),
        "weights": export(engine),
        "said": " ".join(said),
    }


def in_turn(
    layout: Layout | FsdpLayout,
    model_path: str,
    own: str,
    other: str | None,
    knobs: dict[str, Any] | None = KNOBS,
) -> dict[str, Any]:
    """Saved and resumed under the same layout; then resumed from another layout's checkpoint, if
    there is one.
    """
    result = {
        "uninterrupted": save_and_go_on(layout, model_path, own, knobs),
        "resumed": resume(layout, model_path, own, knobs),
    }
    if other is not None:
        result["other"] = resume(layout, model_path, other)
    return result


def load_only(layout: Layout | FsdpLayout, model_path: str, checkpoint: str) -> dict[str, Any]:
    return {"moments": new_engine(layout, model_path)._load_state(checkpoint)}


def refusals(layout: Layout | FsdpLayout, model_path: str, checkpoints: list[str]) -> list[str]:
    """What loading each checkpoint's CAPO state says; one engine serves for all."""
    engine = new_engine(layout, model_path)
    said = []
    for path in checkpoints:
        try:
            engine._load_state(path)
            said.append("loaded")
        except RuntimeError as e:
            said.append(str(e))
    return said


def damaged(checkpoint: Path, copies: Path) -> dict[str, Path]:
    """Copies of a checkpoint's CAPO state, each damaged in another way."""
    import pickle
    import shutil

    def overwrite_index(data: bytes) -> Callable[[Path], None]:
        return lambda folder: folder.joinpath(".metadata").write_bytes(data) and None

    def flip(folder: Path) -> None:
        """The bits of one moment, deep inside the largest file: torch's reader does not notice."""
        file = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        at = len(data) // 2
        data[at : at + 4] = bytes(b ^ 0x15 for b in data[at : at + 4])
        file.write_bytes(data)

    def truncate(folder: Path) -> None:
        file = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
        file.write_bytes(file.read_bytes()[:200])

    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (copies / "executed",))

    ways: dict[str, Callable[[Path], None]] = {
        "code": overwrite_index(pickle.dumps(Code())),
        "no pickle": overwrite_index(b"not a pickle"),
        "half an index": lambda folder: overwrite_index((folder / ".metadata").read_bytes()[:300])(
            folder
        ),
        "no index": lambda folder: (folder / ".metadata").unlink(),
        "flipped": flip,
        "truncated": truncate,
    }
    result = {}
    for name, damage in ways.items():
        result[name] = copies / name.replace(" ", "-")
        shutil.copytree(checkpoint / "capo", result[name] / "capo")
        damage(result[name] / "capo/dist_ckpt")
    return result
