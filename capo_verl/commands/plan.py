# SPDX-License-Identifier: Apache-2.0
"""``capo-verl plan``: the memory of a run, for sizes on the command line or a configuration that a
dry run has printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from capo_verl.commands.refusal import refuse
from capo_verl.launch.hardware import H100_80GB, RESERVE, machine_memory
from capo_verl.plugin.checks.model_shape import KNOWN, ModelShape, find_shape

if TYPE_CHECKING:
    from capo_verl.launch.plan import Plan
    from capo_verl.plugin.checks.run_spec import RunSpec

SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
EXPERTS = ("experts", "experts_per_token", "expert_intermediate")
EPILOG = f"""exit codes:
  0  the run fits
  1  it does not: sizes that do not divide, or too little memory
  2  wrong usage

examples:
  capo-verl plan Qwen/Qwen2.5-Math-7B --tp 2
  DRY_RUN=1 bash examples/run_qwen2_5_32b_megatron.sh >resolved.yaml
  capo-verl plan --config resolved.yaml

known models: {", ".join(shape.name for shape in KNOWN.values())}
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="estimate the memory of a run per GPU and phase; exit code 1 if it does not fit",
        description="Memory that an RL run will need, per GPU and phase; refuses what does not "
        "divide or fit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        help="folder with config.json, name on the hub, or one of the known models",
    )
    add("--config", type=Path, help="YAML that DRY_RUN=1 printed; replaces all sizes below")
    add("--json", action="store_true", help="print JSON")
    add(
        "--gpu-memory",
        type=float,
        default=H100_80GB,
        help="GiB (default: %(default)s, an H100-80GB)",
    )
    add(
        "--reserve",
        type=float,
        default=RESERVE,
        help="GiB not counted: CUDA, NCCL, fragmentation (%(default)s)",
    )
    _add_sizes(parser.add_argument_group("another model"))
    _add_run(parser.add_argument_group("run (defaults: the paper's conservative regime)"))
    parser.set_defaults(run=run)


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    for name in SIZES:
        group.add_argument("--" + name.replace("_", "-"), type=int)
    for name in EXPERTS:
        group.add_argument("--" + name.replace("_", "-"), type=int, default=0, help="(none)")
    group.add_argument("--tied", action="store_true", help="the LM head is the embedding")


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for name, default in {
        "nodes": 1, "gpus_per_node": 8, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1,
        "prompts": 144, "completions_per_prompt": 8,
        "prompt_length": 512, "response_length": 1024, "tokens_per_gpu": 16384, "rollout_tp": 1,
        "rollout_pp": 1,
    }.items():  # fmt: skip
        add("--" + name.replace("_", "-"), type=int, default=default, help="(default: %(default)s)")
    add("--etp", type=int, help="ranks that share an expert (default: as many as --tp)")
    add("--mini-batch", type=int, help="prompts per optimizer step (default: all)")
    add("--recompute", choices=("none", "selective", "full"), default="full")
    add("--no-offload", action="store_true", help="keep parameters and optimizer on the GPU")
    add(
        "--rollout-memory",
        type=float,
        default=0.6,
        help="gpu_memory_utilization (default: %(default)s)",
    )
    add("--no-capo", action="store_true", help="without the filter")
    add("--moments-dtype", choices=("float32", "bfloat16"), default="float32")
    add("--engine", choices=("megatron", "fsdp2"), default="megatron")
    add("--cpu", action="store_true", help="the embedded CPU default")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns the exit code."""
    from capo_verl.launch.plan import PlanError

    try:
        plan = _plan(args)
    except PlanError as error:
        print(f"capo-verl plan: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        return refuse("plan", error)
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan.table())
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    """
    Raises:
        PlanError: in one sentence, what cannot work.
        ValueError, OSError: in one sentence, what is wrong with the arguments.
    """
    from capo_verl.launch.plan import make_plan

    spec = _resolved(args.config) if args.config else _described(args)
    shape = _shape(args, args.model or spec.model or None)
    return make_plan(spec, shape, machine_memory() if spec.cpu else args.gpu_memory, args.reserve)


def _shape(args: argparse.Namespace, model: str | None) -> ModelShape:
    """
    Raises:
        ValueError: if the model is not known, or not all of its sizes are given.
    """
    given = {name: getattr(args, name) for name in SIZES}
    if any(given.values()):
        given["kv_heads"] = given["kv_heads"] or given["heads"]
        if given["hidden"] and given["heads"]:
            given["head_dim"] = given["head_dim"] or given["hidden"] // given["heads"]
        missing = [name for name, size in given.items() if not size]
        if missing:
            raise ValueError(
                f"--{missing[0].replace('_', '-')} is missing: give all sizes of the model"
            )
        experts = {name: getattr(args, name) for name in EXPERTS}
        if any(experts.values()) and not all(experts.values()):
            lacking = next(name for name, size in experts.items() if not size)
            raise ValueError(
                f"--{lacking.replace('_', '-')} is missing: give all sizes of the experts"
            )
        return ModelShape(name=model or "model", tied=args.tied, **given, **experts)
    if not model:
        raise ValueError("name a model, give its sizes (--layers ...), or --config")
    shape = find_shape(model)
    if shape is None:
        raise ValueError(
            f"{model} is no folder with a config.json and not known: give --layers, --hidden, ..."
        )
    return shape


def _resolved(path: Path) -> RunSpec:
    """The run of a configuration that a dry run has printed.

    Raises:
        ValueError, OSError: if the file holds none.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf

    from capo_verl.plugin.checks.run_spec import from_config

    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is no YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"--config {path} holds a list: give what DRY_RUN=1 printed")
    return from_config(
        config, cpu=OmegaConf.select(config, "actor_rollout_ref.rollout.name") == "hf"
    )


def _described(args: argparse.Namespace) -> RunSpec:
    """The run that the arguments describe.

    Raises:
        PlanError: for a mini-batch that is more than the batch.
    """
    from capo_verl.config import verl_knobs
    from capo_verl.launch.plan import PlanError
    from capo_verl.plugin.checks.run_spec import RunSpec

    if (args.mini_batch or 0) > args.prompts:
        # verl/workers/config/actor.py:225 refuses it for micro-batches of so many completions. For
        # those of so many tokens verl/trainer/ppo/padding_utils.py:144 fills the batch up.
        raise PlanError(
            f"--prompts {args.prompts} are less than one --mini-batch {args.mini_batch}: verl "
            "refuses that, or fills it up with samples that count for nothing; lower --mini-batch"
        )
    offload = not (args.no_offload or args.cpu)
    return RunSpec(
        engine=args.engine, cpu=args.cpu, nodes=args.nodes, gpus_per_node=args.gpus_per_node,
        tp=args.tp, pp=args.pp, vpp=args.vpp, cp=args.cp, ep=args.ep, etp=args.etp,
        prompts=args.prompts,
        completions_per_prompt=args.completions_per_prompt,
        mini_batch=args.mini_batch or args.prompts, prompt_length=args.prompt_length,
        response_length=args.response_length, tokens_per_gpu=args.tokens_per_gpu,
        log_prob_tokens_per_gpu=args.tokens_per_gpu, recompute=args.recompute,
        offload_parameters=offload,
        offload_optimizer=offload, rollout="hf" if args.cpu else "vllm", rollout_tp=args.rollout_tp,
        rollout_pp=args.rollout_pp, rollout_memory=args.rollout_memory,
        capo=None if args.no_capo else {**verl_knobs("grpo"), "moments_dtype": args.moments_dtype},
    )  # fmt: skip
