# SPDX-License-Identifier: Apache-2.0
"""The server of ``warm.py``, a program: ``python warm_server.py FILE_DESCRIPTOR_OF_THE_LISTENER``.

It stops when its standard input is closed.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
import traceback
import types

PACKAGES = (
    "accelerate", "datasets", "fastapi", "hydra", "matplotlib.pyplot", "megatron.core", "numpy",
    "omegaconf", "packaging", "pandas", "peft", "psutil", "pyarrow.parquet",
    "rich.console", "scipy.stats", "tensordict", "tokenizers", "torch",
    "torch._inductor.compile_fx", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.utils.data", "torchdata", "transformers", "transformers.generation",
    "transformers.modeling_utils", "uvicorn", "yaml",
)  # fmt: skip
"""Third parties'; not Ray, which reads its settings when it is imported.

One that is missing is left to the command, to find out.
"""


def main(listener: socket.socket) -> None:
    base = sys.path[1:]  # without this file's folder
    sys.path[:] = base
    for package in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the commands' own
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(connection, base)
        connection.close()


def _attend(connection: socket.socket, base: list[str]) -> None:
    """Runs the command in a child, says which, and how it ended; ends it if the client has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    files = array.array("i")
    files.frombytes(ancillary[0][2][:12])
    message = bytearray()
    while len(message) < int.from_bytes(size, "big"):
        message += connection.recv(1 << 20)
    parts = message.decode("utf-8", "surrogateescape").split("\0")
    folder, mask, group, executable, count, *rest = parts
    arguments, variables = rest[: int(count)], rest[int(count) :]
    process = os.fork()
    if process == 0:
        connection.close()
        for wanted, given in enumerate(files):
            os.dup2(given, wanted)
        os.closerange(min(files), max(files) + 1)
        os.umask(int(mask))
        with contextlib.suppress(OSError):  # the group of another session
            os.setpgid(0, int(group))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(pair.split("=", 1) for pair in variables)
        sys.executable = executable
        _exit(_run(arguments, base))
    for given in files:
        os.close(given)
    connection.sendall(process.to_bytes(8, "big"))
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def _run(arguments: list[str], base: list[str]) -> int:
    """What ``python ARGUMENTS`` does, and its exit code."""
    import runpy
    import warnings

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTHONUNBUFFERED" in os.environ or arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
    filters = list(filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")))
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            filters.append(arguments.pop(0))
    warnings._processoptions(filters)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    module.__dict__.update(__builtins__=__builtins__, __spec__=None)
    extra = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    kind, first = arguments[0], arguments[0]
    if kind in ("-c", "-m"):
        first = os.getcwd() if kind == "-m" else ""
        sys.argv = [kind, *arguments[2:]]
    else:
        first = os.path.dirname(os.path.realpath(kind))
        sys.argv = arguments
    sys.path[:] = [first, *extra, *base]
    importlib.invalidate_caches()
    with contextlib.suppress(ImportError):
        import sitecustomize  # noqa: F401  of PYTHONPATH
    try:
        if kind == "-m":
            runpy._run_module_as_main(arguments[1])
        elif kind == "-c":
            exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
        else:
            module.__file__ = os.path.abspath(kind)
            with open(kind, "rb") as file:
                exec(compile(file.read(), module.__file__, "exec"), module.__dict__)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return (e.code or 0) & 0xFF
        print(e.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        _print_traceback()
        return 1
    return 0


def _print_traceback() -> None:
    """From the command's own frames on."""
    kind, error, frames = sys.exc_info()
    sys.excepthook(kind, error.with_traceback(frames.tb_next), frames.tb_next)


def _exit(code: int) -> None:
    """As an interpreter ends: threads, exit functions, buffers."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
