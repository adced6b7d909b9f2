# SPDX-License-Identifier: Apache-2.0
"""``scripts/plan.py``: the plan for sizes given on the command line, or for the configuration a dry
run has printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from capo_verl.config import verl_knobs
from capo_verl.launch.plan import H100_80GB, RESERVE, Plan, make_plan
from capo_verl.plugin.checks.model_shape import KNOWN, ModelShape, find_shape
from capo_verl.plugin.checks.run_spec import RunSpec, from_config

SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="plan.py",
        description="Memory that an RL run will need, per GPU and phase; refuses what does not "
        "divide or fit (exit code 1).",
        epilog="Known models: " + ", ".join(shape.name for shape in KNOWN.values()),
    )
    made.add_argument(
        "model",
        nargs="?",
        help="folder with config.json, name on the hub, or one of the known models",
    )
    made.add_argument(
        "--config", type=Path, help="YAML that DRY_RUN=1 printed; replaces all sizes below"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument(
        "--gpu-memory",
        type=float,
        default=H100_80GB,
        help="GiB (default: %(default)s, an H100-80GB)",
    )
    made.add_argument(
        "--reserve",
        type=float,
        default=RESERVE,
        help="GiB not counted: CUDA, NCCL, fragmentation (%(default)s)",
    )
    shape = made.add_argument_group("another model")
    for name in SHAPE:
        shape.add_argument("--" + name.replace("_", "-"), type=int)
    shape.add_argument("--tied", action="store_true", help="the LM head is the embedding")
    run = made.add_argument_group("run (defaults: the paper's conservative regime)")
    for name, default in {
        "nodes": 1, "gpus_per_node": 8, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "prompts": 144,
        "completions_per_prompt": 8,
        "prompt_length": 512, "response_length": 1024, "tokens_per_gpu": 16384, "rollout_tp": 1,
        "rollout_pp": 1,
    }.items():  # fmt: skip
        run.add_argument(
            "--" + name.replace("_", "-"), type=int, default=default, help="(default: %(default)s)"
        )
    run.add_argument("--mini-batch", type=int, help="prompts per optimizer step (default: all)")
    run.add_argument("--recompute", choices=("none", "selective", "full"), default="full")
    run.add_argument(
        "--no-offload", action="store_true", help="keep parameters and optimizer on the GPU"
    )
    run.add_argument(
        "--rollout-memory",
        type=float,
        default=0.6,
        help="gpu_memory_utilization (default: %(default)s)",
    )
    run.add_argument("--no-capo", action="store_true", help="without the filter")
    run.add_argument("--moments-dtype", choices=("float32", "bfloat16"), default="float32")
    run.add_argument("--engine", choices=("megatron", "fsdp2"), default="megatron")
    run.add_argument("--cpu", action="store_true", help="the embedded CPU default")
    return made


def shape_of(args: argparse.Namespace, model: str | None) -> ModelShape:
    """
    Raises:
        ValueError: if the model is not known, or not all of its sizes are given.
    """
    given = {name: getattr(args, name) for name in SHAPE}
    if any(given.values()):
        given["kv_heads"] = given["kv_heads"] or given["heads"]
        if given["hidden"] and given["heads"]:
            given["head_dim"] = given["head_dim"] or given["hidden"] // given["heads"]
        missing = [name for name, size in given.items() if not size]
        if missing:
            raise ValueError(
                f"--{missing[0].replace('_', '-')} is missing: give all sizes of the model"
            )
        return ModelShape(name=model or "model", tied=args.tied, **given)
    if not model:
        raise ValueError("name a model, give its sizes (--layers ...), or --config")
    shape = find_shape(model)
    if shape is None:
        raise ValueError(
            f"{model} is no folder with a config.json and not known: give --layers, --hidden, ..."
        )
    return shape


def run_of(args: argparse.Namespace) -> RunSpec:
    """The run that the arguments describe."""
    if args.config:
        import yaml
        from omegaconf import OmegaConf

        try:
            config = OmegaConf.load(args.config)
        except yaml.YAMLError as e:
            raise ValueError(f"--config {args.config} is no YAML: {e}") from None
        return from_config(
            config, cpu=OmegaConf.select(config, "actor_rollout_ref.rollout.name") == "hf"
        )
    offload = not (args.no_offload or args.cpu)
    return RunSpec(
        engine=args.engine, cpu=args.cpu, nodes=args.nodes, gpus_per_node=args.gpus_per_node,
        tp=args.tp, pp=args.pp, vpp=args.vpp, cp=args.cp, prompts=args.prompts,
        completions_per_prompt=args.completions_per_prompt,
        mini_batch=args.mini_batch or args.prompts, prompt_length=args.prompt_length,
        response_length=args.response_length, tokens_per_gpu=args.tokens_per_gpu,
        log_prob_tokens_per_gpu=args.tokens_per_gpu, recompute=args.recompute,
        offload_parameters=offload,
        offload_optimizer=offload, rollout="hf" if args.cpu else "vllm", rollout_tp=args.rollout_tp,
        rollout_pp=args.rollout_pp, rollout_memory=args.rollout_memory,
        capo=None if args.no_capo else {**verl_knobs("grpo"), "moments_dtype": args.moments_dtype},
    )  # fmt: skip


def plan_of(args: argparse.Namespace) -> Plan:
    """
    Raises:
        ValueError: in one sentence, what cannot work.
    """
    run = run_of(args)
    shape = shape_of(args, args.model or run.model or None)
    return make_plan(run, shape, machine_memory() if run.cpu else args.gpu_memory, args.reserve)


def machine_memory() -> float:
    """GiB of this machine."""
    import psutil

    return round(psutil.virtual_memory().total / (1 << 30), 1)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        plan = plan_of(args)
    except (ValueError, OSError) as e:
        print(f"plan.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan.table())
    return 0
