# SPDX-License-Identifier: Apache-2.0
"""The plugin in Ray workers, one on every node: ``python -m capo_verl.commands.doctor.workers
[ADDRESS]`` prints what they see, as JSON.

Without an address it starts a Ray of its own, whose workers inherit this process' environment.
Those of a cluster that already runs have the cluster's, plus what the launchers hand on
(``examples/common.sh``).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from capo_verl.commands.doctor import registration
from capo_verl.commands.doctor.answering_process import AnsweringProcess
from capo_verl.commands.doctor.check import OK, WARN, Broken, Outcome, one_line

SECONDS = 180.0
"""Time for a worker to import verl; from a busy network file system that takes its time."""
CONNECT_SECONDS = 10.0
ATTEMPTS, TOO_SLOW = 6, "timed out during startup"
"""Ray gives itself 30 s to start (``ray/_private/node.py``); a busy machine needs more, until the
checks beside this one end.
"""
TOKEN = (
    "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH if that is not "
    "~/.ray/auth_token"
)
STORE_BYTES = 80 << 20
FORWARDED = ("VERL_PLATFORM",)


def start(address: str | None) -> AnsweringProcess:
    """Ask the workers in the background.

    Args:
        address: of a Ray that runs; None starts one.
    """
    # As for runs on a CPU (examples/common.sh): no idle workers, and none that a busy machine
    # starves.
    quick = {
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",
    }
    environment = {**quick, "RAY_USAGE_STATS_ENABLED": "0", **os.environ}
    environment.pop("RAY_ADDRESS", None)
    return AnsweringProcess(
        "capo_verl.commands.doctor.workers",
        *([address] if address else []),
        environment=environment,
    )


def judge(child: AnsweringProcess, address: str | None, here: Mapping[str, str | None]) -> Outcome:
    """
    Args:
        here: the ``versions`` that this process sees.

    Raises:
        Broken: naming the nodes where the plugin is not what it should be.
    """
    where = f"the Ray at {address}" if address else "a Ray of its own"
    try:
        nodes = child.answer(2 * SECONDS)
    except Broken as e:
        what = (
            "check that it runs and is Ray's head, or unset RAY_ADDRESS"
            if address
            else "try `ray start --head`"
        )
        raise Broken(
            f"{where} could not be asked: {e}; {what}, or leave this check out with --no-ray"
        ) from None
    wrong: dict[str, str] = {}
    differing: dict[str, str] = {}
    for node, found in nodes.items():
        if "error" in found:
            wrong[node] = (
                f"no worker could be asked ({found['error']}): repair that node, or take it out of "
                "the cluster"
            )
            continue
        problems = registration.problems(found["seen"])
        if problems:
            wrong[node] = problems[0]
        others = {name: v for name, v in found["seen"]["versions"].items() if v != here[name]}
        if others:
            listed = (
                f"{name} {v or 'missing'} (here {here[name] or 'missing'})"
                for name, v in others.items()
            )
            differing[node] = ", ".join(listed)
    if wrong:
        first, problem = next(iter(wrong.items()))
        of = (
            f"on {len(wrong)} of {len(nodes)} nodes, first {first}"
            if len(nodes) > 1
            else f"in a worker of {where}"
        )
        raise Broken(f"{of}: {problem}")
    if differing:
        first, versions = next(iter(differing.items()))
        return Outcome(
            WARN, f"node {first} has {versions}: install the same versions on every node"
        )
    engines = dict.fromkeys(
        e["name"] for found in nodes.values() for e in found["seen"]["engines"].values()
    )
    workers = "a worker" if len(nodes) == 1 else f"workers on {len(nodes)} nodes"
    return Outcome(
        OK, f"{workers} of {where}: policy loss '{registration.LOSS}', {' and '.join(engines)}"
    )


def _reach(address: str) -> None:
    """Ray itself would try for a minute and a half.

    An address without a port, such as ``auto``, is left to it.
    """
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as e:
            sys.exit(f"nobody answers there ({e.strerror or e})")


def ask(address: str | None) -> dict[str, Any]:
    """Node -> ``seen`` (:func:`registration.look`) or ``error``."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "num_cpus": 1,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
    }
    if address:
        env_vars = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
        options = {"runtime_env": {"env_vars": env_vars}}
        _reach(address)
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
            break
        except ConnectionError as e:
            if "AuthToken" in str(e.__cause__):
                sys.exit(TOKEN)
            raise
        except Exception as e:  # of no type of its own
            if TOO_SLOW not in str(e) or not attempts_left:
                raise
            ray.shutdown()
    try:
        ray.cloudpickle.register_pickle_by_value(registration)
        look = ray.remote(num_cpus=0, max_retries=0)(registration.look)
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[look.options(scheduling_strategy=there).remote()] = node["NodeName"]
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
        found: dict[str, Any] = {
            asked[task]: {"error": f"no answer within {SECONDS:g} s"} for task in late
        }
        for task in done:
            try:
                found[asked[task]] = {"seen": ray.get(task)}
            except ray.exceptions.RayError as e:
                found[asked[task]] = {"error": one_line(e)}
        return found
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1] if len(sys.argv) > 1 else None)))
