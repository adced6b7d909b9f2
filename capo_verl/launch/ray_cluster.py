# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.launch.ray_cluster``: wait until every node of a job has joined its Ray
cluster with all its GPUs.

verl would wait without a word, or place the run on the nodes that happen to be there. This says
which node is missing, and why as far as its log tells.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from packaging.version import Version

Cluster = Mapping[str, float]
"""Name of each living node, and how many GPUs Ray found there."""

FIRST_WITH_TOKENS = "2.52"
POLL_SECONDS = 1.0
TAIL_LINES = 20


class NotReady(Exception):
    """The cluster is not complete in time.

    Args:
        wrong: what is wrong, by node.
        seconds: how long it was waited for.
    """

    def __init__(self, wrong: Mapping[str, str], seconds: float):
        super().__init__(
            f"after {seconds:g} s: "
            + "; ".join(f"node {node} {what}" for node, what in wrong.items())
        )
        self.nodes = list(wrong)


def problems(cluster: Cluster, nodes: Sequence[str], gpus_per_node: float) -> dict[str, str]:
    """Problems by node; empty if all ``nodes`` are there with the ``gpus_per_node`` that they
    should have.
    """
    found = {}
    for node in nodes:
        if node not in cluster:
            found[node] = "has not joined Ray"
        elif cluster[node] != gpus_per_node:
            found[node] = f"joined with {cluster[node]:g} GPUs, {gpus_per_node:g} expected"
            if cluster[node] == 0:
                found[node] += " (a run on CPUs? then set VERL_PLATFORM=cpu)"
    return found


def wait_for(
    look: Callable[[], Cluster],
    nodes: Sequence[str],
    gpus_per_node: float,
    timeout: float,
    report: Callable[[str], None] = print,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Poll until the cluster is complete.

    Args:
        look: the cluster as it is now.
        timeout: seconds.

    Raises:
        NotReady: naming the nodes that are missing or lack GPUs after ``timeout``.
    """
    deadline = now() + timeout
    joined: set[str] = set()
    while True:
        cluster = look()
        for node in nodes:
            if node in cluster and node not in joined:
                joined.add(node)
                report(
                    f"{node} joined with {cluster[node]:g} GPUs ({len(joined)} of {len(nodes)} "
                    "nodes)"
                )
        wrong = problems(cluster, nodes, gpus_per_node)
        if not wrong:
            return
        if now() >= deadline:
            raise NotReady(wrong, timeout)
        sleep(POLL_SECONDS)


def ray_cluster() -> Cluster:
    """The cluster this process is connected to."""
    import ray

    return {
        node["NodeName"]: node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]
    }


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a node's log, indented; says so if there is none."""
    try:
        text = path.read_text(errors="replace")
    except OSError as e:
        return f"    ({e})"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (empty)"


def log_of(pattern: str, node: str) -> Path:
    """A node's log: ``{node}`` in ``pattern`` is its name; other braces are the path's own."""
    return Path(pattern.replace("{node}", node))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the cluster is complete, 3 if it is not in time."""
    parser = argparse.ArgumentParser(
        prog="python -m capo_verl.launch.ray_cluster", description=__doc__
    )
    parser.add_argument("--address", required=True, help="HOST:PORT of Ray's head")
    parser.add_argument(
        "--nodes", required=True, nargs="+", help="names the nodes were started with"
    )
    parser.add_argument("--gpus-per-node", required=True, type=float)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds (default: 300)")
    parser.add_argument(
        "--log", default="ray-{node}.log", help="path of a node's log (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    import ray

    if os.environ.get("RAY_AUTH_MODE") == "token" and Version(ray.__version__) < Version(
        FIRST_WITH_TOKENS
    ):
        print(
            f"Ray {ray.__version__} knows no tokens ({FIRST_WITH_TOKENS} does): whoever reaches "
            "its ports can run code"
        )
    try:
        ray.init(address=args.address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as e:
        print(f"no Ray at {args.address}: {e}", file=sys.stderr)
        print(tail(log_of(args.log, args.nodes[0])), file=sys.stderr)
        return 3
    try:
        wait_for(
            ray_cluster,
            args.nodes,
            args.gpus_per_node,
            args.timeout,
            lambda line: print(line, flush=True),
        )
    except NotReady as e:
        for node in e.nodes:
            path = log_of(args.log, node)
            print(f"  last lines of {path}:\n{tail(path)}", file=sys.stderr)
        print(e, file=sys.stderr)  # last, where the job's own output shows it
        return 3
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
