# SPDX-License-Identifier: Apache-2.0
"""The reward in a Ray actor, as verl's reward workers call it: threads of an actor, child processes
of its own.
"""

from __future__ import annotations

import os

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("math_verify")
pytestmark = pytest.mark.e2e


class RewardWorker:
    async def score(self, responses: list[str]) -> list[dict]:
        import asyncio

        from capo_verl.data.rewards.math_answers import compute_score

        loop = asyncio.get_running_loop()
        calls = [
            loop.run_in_executor(
                None, lambda r=r: compute_score("math", r, "1/2", {}, timeout_seconds=1.0)
            )
            for r in responses
        ]
        return await asyncio.gather(*calls)

    def children(self) -> list[int]:
        import psutil

        return [
            p.pid
            for p in psutil.Process().children()
            if "capo_verl.data.rewards.worker" in p.cmdline()
        ]


def test_answers_are_judged_and_nothing_is_left_behind():
    import time

    import psutil

    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        worker = ray.remote(RewardWorker).remote()
        responses = [
            "\\boxed{0.5}",
            "\\boxed{9^{9^{9^{9}}}}",
            "\\boxed{2/4}",
            "\\boxed{1/3}",
            "none",
        ]
        results = ray.get(worker.score.remote(responses))
        assert [r["score"] for r in results] == [1.0, 0.0, 1.0, 0.0, 0.0]
        assert [r["judge_failed"] for r in results] == [0.0, 1.0, 0.0, 0.0, 0.0]
        pids = ray.get(worker.children.remote())
        assert 1 <= len(pids) <= 2
        ray.kill(worker)
        deadline = time.monotonic() + 20
        while any(psutil.pid_exists(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()
