# SPDX-License-Identifier: Apache-2.0
"""Small logs for the viewer's tests, with numbers that are easy to compute by hand."""

from __future__ import annotations

import json
from pathlib import Path

SCRIPT_END = "</script><img src=x onerror=\"document.title='broken'\">"
"""A token's text that would run if it were put into a page as it is."""


def capo_rows(steps: int = 10, offset: float = 0.0) -> list[tuple[int, dict[str, float]]]:
    """A validation before training, then ``steps`` training steps with CAPO's metrics."""
    rows: list[tuple[int, dict[str, float]]] = [(0, {"val-core/set/acc/mean@1": 0.25 + offset})]
    for step in range(1, steps + 1):
        data = {
            "critic/score/mean": 0.3 + 0.01 * step + offset,
            "actor/entropy": 1.0 / step,
            "response_length/mean": 8.0,
            "prompt_length/mean": 12.0,
            "perf/total_num_tokens": 640.0,  # 32 completions of 20 tokens
            "capo/rejection_rate": 0.25,
            "capo/rejection_rate_positive_advantage": 0.1,
            "capo/rejection_rate_negative_advantage": 0.4,
            "capo/policy_shift_p50": 1e-6 * step,
            "capo/policy_shift_p99": 1e-4 * step,
            "capo/objective_shift_p50": 1e-3 * (-1) ** step,
        }
        if step % 5 == 0:
            data["val-core/set/acc/mean@1"] = 0.3 + 0.02 * step + offset
        rows.append((step, data))
    return rows


def write_file_log(path: Path, rows: list[tuple[int, dict[str, float]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in rows),
        encoding="utf-8",
    )
    return path


def write_config(folder: Path, **settings: object) -> None:
    """As Hydra keeps it for the launchers. Keyword ``data__seed`` is the key ``data.seed``."""
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {"data": {"train_batch_size": 4}, "actor_rollout_ref": {"rollout": {"n": 8}}}
    )
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    (folder / "hydra" / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "hydra" / ".hydra" / "config.yaml")


def sample(
    step: int, number: int, texts: list[str], rejected: list[int], advantage: float = 1.0
) -> dict:
    """One entry of ``capo_tokens.jsonl``; m_F of token i is 10^(i - 7)."""
    n = len(texts)
    return {
        "step": step, "sample": number, "chosen": "first", "mode": "filter",
        "prompt": {"ids": [90, 91], "text": ["Say ", "it: "]},
        "response": {
            "ids": list(range(n)), "text": texts, "advantage": [advantage] * n, "mask": [1] * n,
            "probability": [0.5] * n,
            "policy_shift": [10.0 ** (i - 7) for i in range(n)], "objective_shift": [1e-3] * n,
            "in_trust_region": [int(i not in rejected) for i in range(n)],
            "weight": [float(i not in rejected) for i in range(n)],
        },
    }  # fmt: skip


def write_samples(path: Path, entries: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8"
    )
    return path


def write_runs(folder: Path) -> Path:
    """Two seeds of CAPO, with samples of the first, and one run of GRPO."""
    for seed in (1, 2):
        run = folder / f"capo-seed{seed}"
        write_file_log(run / "metrics.jsonl", capo_rows(offset=0.1 * seed))
        write_config(
            run, data__seed=seed, actor_rollout_ref__actor__policy_loss__capo__policy_shift_max=1e-4
        )
    second = {
        **sample(1, 1, ["a\n", " b", "", "d", "é"], [2, 4], advantage=-1.0),
        "chosen": "most_rejected",
    }
    second["response"]["weight"][2] = 0.5  # as soft weights leave it
    turns = sample(2, 0, ["1", "+", "2", "=3", "!", "so", "3"], [1, 6])
    turns["response"] |= {  # a calculator speaks between two turns
        "mask": [1, 1, 1, 0, 0, 1, 1],
        "policy_shift": [1e-7, 1e-6, 1e-5, 0.0, 0.0, 1e-5, 1e-3],
    }
    write_samples(
        folder / "capo-seed1" / "checkpoints" / "capo_tokens.jsonl",
        [
            sample(1, 0, ["one ", "two ", SCRIPT_END, "four"], []),
            second,
            turns,
            sample(5, 3, ["x", "y", "z"], [2]),
        ],
    )
    grpo = [
        (step, {k: v for k, v in data.items() if not k.startswith("capo/")})
        for step, data in capo_rows(20)
    ]
    write_file_log(folder / "grpo" / "metrics.jsonl", grpo)
    write_config(folder / "grpo", data__seed=1, trainer__note=SCRIPT_END)
    return folder
