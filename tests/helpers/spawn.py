# SPDX-License-Identifier: Apache-2.0
"""Run a test's function on several gloo ranks of this machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

TORCH = ("torch",)
ENGINE_MODULES = ("tests.helpers.engine_modules",)
WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
"""Of three seconds a rank, to compile two of verl's functions. Training runs compile them."""
_SERVERS: dict[tuple[str, ...], multiprocessing.forkserver.ForkServer] = {}


class RankError(RuntimeError):
    """A rank failed; the message holds its traceback."""


def _rank_main(
    result: Connection,
    environment: dict[str, str],
    sys_path: list[str],
    store: str,
    timeout: float,
    call: bytes,
) -> None:
    """One rank: the parent's environment, a gloo group, the call, its result or its traceback."""
    try:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = environment["TMPDIR"]
        sys.path[:] = sys_path
        import torch

        torch.set_num_threads(1)
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        fn, args, kwargs = pickle.loads(call)
        value = fn(*args, **kwargs)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Pickled here: multiprocessing would share the memory of tensors, which dies with this
        # process.
        result.send_bytes(pickle.dumps((True, value)))
    except BaseException:
        result.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        result.close()
        # Megatron starts a process for its first checkpoint; it would outlive a rank that is killed
        # while it waits for it.
        for child in multiprocessing.active_children():
            child.kill()


def _context(preload: tuple[str, ...]) -> Any:
    """Processes forked from a server that has imported `preload` once.

    Each `preload` has its server, which stays until this process ends.
    """
    if preload not in _SERVERS:
        _SERVERS[preload] = multiprocessing.forkserver.ForkServer()
        _SERVERS[preload].set_forkserver_preload(list(preload))
    # What a process of this context asks for the fork.
    multiprocessing.forkserver.connect_to_new_process = _SERVERS[preload].connect_to_new_process
    return multiprocessing.get_context("forkserver")


def run_on_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 180.0,
    preload: tuple[str, ...] = TORCH,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on `world_size` ranks of a gloo group and return what each of
    them returned.

    ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` are set, torch uses one thread. What ranks leave in
    their temporary folder goes with it: verl's locks of checkpoints, wandb's media.

    Args:
        fn: a function at the top level of a module; it, the arguments and the results travel by
            pickle.
        timeout: seconds for everything, and for each collective.
        preload: modules that the forking server imports once. Tests that give the same ones share a
            server.

    Raises:
        RankError: with the traceback of the rank that failed first, or the ranks still running
            after `timeout`.
    """
    __tracebackhide__ = True  # pytest: show the rank's traceback, not this function's
    context = _context(preload)
    call = pickle.dumps((fn, args, kwargs))
    directory = tempfile.mkdtemp(prefix="capo_verl_ranks_")

    processes, pending = [], {}
    try:
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "TMPDIR": directory,
                **WITHOUT_COMPILER,
            }
            receiver, sender = context.Pipe(duplex=False)
            store = os.path.join(directory, "store")
            process = context.Process(
                target=_rank_main, args=(sender, environment, list(sys.path), store, timeout, call)
            )
            process.start()
            sender.close()
            processes.append(process)
            pending[receiver] = rank

        results: list[Any] = [None] * world_size
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(
                    f"ranks {sorted(pending.values())} of {world_size} still run after "
                    f"{timeout:.0f} s"
                )
            for receiver in ready:
                rank = pending.pop(receiver)
                try:
                    ok, value = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    ok, value = False, "the process died without a traceback"
                if not ok:
                    raise RankError(f"rank {rank} of {world_size} failed\n{value}")
                results[rank] = value
        return results
    finally:
        for process in processes:
            process.join(timeout=0 if pending else 10)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(directory, ignore_errors=True)
