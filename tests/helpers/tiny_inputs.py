# SPDX-License-Identifier: Apache-2.0
"""What a run of verl's trainer needs, as small as it gets: a random model, a few prompts, a reward
that varies.
"""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny_model import make_tiny_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    digits = sum(c.isdigit() for c in solution_str)
    return {"score": digits / max(len(solution_str), 1), "acc": 0.0}
"""


def make_inputs(
    folder: Path, prompts: int = 16, hidden_size: int = 64, model_type: str = "qwen2"
) -> Path:
    """Write ``model/``, ``train.parquet``, ``test.parquet`` and ``reward.py`` into ``folder``, and
    return it.
    """
    import pandas as pd

    make_tiny_model(folder / "model", model_type, hidden_size=hidden_size)
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"{i}+{i}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i},
        }
        for i in range(prompts)
    ]
    for split in ("train", "test"):
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder
