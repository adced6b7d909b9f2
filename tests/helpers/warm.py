# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ``python`` that starts with the large packages imported.

A command of this project imports torch and what else verl needs: five seconds of a processor. The
stand-in hands its arguments, folder, environment and open files to a server, which has imported
those packages once and forks for each command. verl and capo_verl are not among them: what they do
when they are imported, in which environment, is under test.

What such a command starts with ``sys.executable`` is handed over as well.

Tests that are about the process itself (signals, its parent, missing packages) take the real one,
and of each kind of command one does.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CLIENT = """#!{python} -IS
import array, os, signal, socket, sys
REAL = {python!r}
arguments = sys.argv[1:]
at = 0
while at < len(arguments) and arguments[at] in ("-u", "-W"):
    at += 1 + (arguments[at] == "-W")
if at >= len(arguments) or (arguments[at][0] == "-" and arguments[at] not in ("-c", "-m")):
    os.execv(REAL, [REAL, *arguments])  # asks for its version, or reads a program
if os.environ.get("TRITON_INTERPRET") != {interpret!r}:  # Triton reads it when it is imported
    os.execv(REAL, [REAL, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
variables = ["=".join(pair) for pair in os.environ.items()]
mask = os.umask(0)
os.umask(mask)
parts = [os.getcwd(), str(mask), str(os.getpgid(0)), os.path.abspath(sys.argv[0])]
parts += [str(len(arguments)), *arguments, *variables]
message = "\\0".join(parts).encode("utf-8", "surrogateescape")
files = array.array("i", [0, 1, 2])
size = len(message).to_bytes(8, "big")
server.sendmsg([size], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(message)
process = int.from_bytes(server.recv(8), "big")
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(process, number))
ended = server.recv(8)
status = int.from_bytes(ended, "big", signed=True) if ended else 1
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def environment_folder() -> Path:
    """What looks like this virtual environment: ``bin`` has ``python`` and ``capo-verl``.

    Both run through a server of this process, with its environment, until it ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="capo_verl_warm_"))
    owner = os.getpid()
    address = f"\0{folder}"  # abstract: no path that could be too long
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_server.py")), str(listener.fileno())],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
    )  # fmt: skip
    listener.close()

    def stop() -> None:
        if os.getpid() != owner:
            return
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    real = Path(sys.executable).parent
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for program in real.iterdir():
        if not program.name.startswith("python"):
            (bin_folder / program.name).symlink_to(program)
    (bin_folder / "capo-verl").unlink()
    client = bin_folder / "python"
    interpret = os.environ.get("TRITON_INTERPRET")
    client.write_text(CLIENT.format(python=sys.executable, address=address, interpret=interpret))
    client.chmod(0o755)
    (bin_folder / "python3").symlink_to("python")
    command = bin_folder / "capo-verl"
    command.write_text(f'#!/bin/sh\nexec "{client}" "{real / "capo-verl"}" "$@"\n')
    command.chmod(0o755)
    return folder


def python() -> str:
    """The stand-in's path."""
    return str(environment_folder() / "bin/python")
