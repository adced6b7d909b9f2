# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.cpu.smollm2``: data and model, from the cache where possible.

Prints their two folders, one a line.
"""

from __future__ import annotations

import argparse
import sys

from capo_verl.cpu.smollm2 import pretrained, task
from capo_verl.plugin.checks.vllm_on_cpu import rollout_problem
from capo_verl.plugin.missing_packages import missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m capo_verl.cpu.smollm2", description=__doc__)
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=2,
        help="the model's attention heads will divide by it (default: 2)",
    )
    parser.add_argument(
        "--rollout",
        default="hf",
        help="who will generate, hf or vllm: refused here, before anything is fetched, if it "
        "cannot (default: hf)",
    )
    args = parser.parse_args()
    if problem := rollout_problem(args.rollout):
        print(problem, file=sys.stderr)
        return 2
    try:
        model_path, _ = pretrained.prepare_model(args.tensor_parallel_size)
        data_dir, _ = task.prepare_data(task.TaskConfig())
    except ImportError as error:
        print(missing("capo_verl.cpu.smollm2", error, "smollm2"), file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        print(f"capo_verl.cpu.smollm2: {error}", file=sys.stderr)
        return 2
    print(data_dir, model_path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
