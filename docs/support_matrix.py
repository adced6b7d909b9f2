# SPDX-License-Identifier: Apache-2.0
"""Writes the table of docs/support.md: ``python docs/support_matrix.py``.

What is refused is found out by composing verl's configuration and asking the start-up checks; what
is tested names the test.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generated import renewed

DOCS = Path(__file__).parent
PAGE = DOCS / "support.md"
GPU_STACK = DOCS / "gpu_stack.json"
"""What ``scripts/test_gpu_stack.sh`` wrote."""

ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
FUSED = (f"{MODEL}.use_fused_kernels=True", f"{MODEL}.use_remove_padding=True")

LAYOUTS = "megatron/test_layouts.py::test_layout"
BFLOAT16 = "engines/test_bfloat16.py::test_decisions_are_those_of_float64_away_from_ties"
ASYNC = "e2e/test_asynchronous.py::test_separate_rollouts_are_of_the_old_policy"
FSDP = "fsdp/test_engine.py::test_training_equals_hugging_face_with_the_float64_filter"


@dataclass(frozen=True)
class Cell:
    """What is known of one feature under one engine."""

    tests: tuple[str, ...] = ()
    """``folder/file.py::function`` below ``tests/``, or ``tests/engines/`` for an engine's."""
    overrides: tuple[str, ...] | None = None
    """Switches the feature on, on verl's command line. None: not a matter of the configuration."""
    capo: str = "grpo"
    note: str = ""
    """Added to the status."""
    status: str = ""
    """In place of the one found out, where the start-up checks cannot know."""


def tested(*tests: str, note: str = "") -> Cell:
    return Cell(tests, note=note)


def asks(*overrides: str, tests: tuple[str, ...] = (), note: str = "", capo: str = "grpo") -> Cell:
    """A feature that the start-up checks may refuse."""
    return Cell(tests, overrides, capo, note)


def says(status: str, *tests: str) -> Cell:
    return Cell(tests, status=status)


UNTESTED = Cell()
NONE = says("does not exist there")


def megatron(key: str, value: object) -> str:
    return f"{ACTOR}.megatron.{key}={value}"


ROWS: dict[str, dict[str, tuple[Cell, Cell]]] = {
    "Parallelism": {
        "tensor": (tested(LAYOUTS), NONE),
        "sequence (with tensor)": (tested(LAYOUTS), NONE),
        "pipeline, virtual pipeline": (tested(LAYOUTS), NONE),
        "data": (tested(LAYOUTS), tested(FSDP)),
        "context, zig-zag; Ulysses": (tested(LAYOUTS), tested(FSDP)),
        "context, contiguous slices": (
            tested(
                "megatron/test_packing.py::test_packed_fields_and_filter_equal_the_oracle",
                note="packing and filter only",
            ),
            NONE,
        ),
        "combinations, up to four processes": (tested(LAYOUTS), UNTESTED),
        "distributed optimizer; FSDP1 and FSDP2": (tested(LAYOUTS), tested(FSDP)),
        "expert, expert tensor": (tested(LAYOUTS), NONE),
        "`dynamic_context_parallel`": (asks(megatron("dynamic_context_parallel", True)), NONE),
        "`use_megatron_fsdp`": (asks(megatron("use_megatron_fsdp", True)), NONE),
    },
    "Batches and models": {
        "packed, padded, dynamic micro-batches": (tested(LAYOUTS), tested(FSDP)),
        "tied embeddings": (
            tested(LAYOUTS),
            tested("fsdp/test_engine.py::test_tied_embeddings_with_fused_kernels"),
        ),
        "vocabulary padded for tensor parallelism": (
            tested(
                LAYOUTS,
                "megatron/test_engine.py::test_padding_of_the_vocabulary_is_never_in_the_support",
            ),
            NONE,
        ),
        "fused cross-entropy": (
            asks(*FUSED, tests=(LAYOUTS,)),
            asks(
                "model_engine=dp",
                *FUSED,
                tests=(FSDP,),
                note="`torch`; `triton` for packed batches",
            ),
        ),
        "fused cross-entropy, tensor without sequence parallelism": (
            asks(
                *FUSED,
                megatron("tensor_model_parallel_size", 2),
                megatron("sequence_parallel", False),
            ),
            NONE,
        ),
        "fused cross-entropy, `liger`": (
            NONE,
            asks("model_engine=dp", *FUSED, f"{MODEL}.fused_kernel_options.impl_backend=liger"),
        ),
        "vision-language, Qwen3-VL, Qwen2.5-VL": (
            says("untested; its `language_model` is tapped, not on a CPU"),
            tested(
                "fsdp/test_vision.py::"
                "test_training_with_images_equals_hugging_face_with_the_float64_filter",
                note="on a CPU Qwen2.5-VL padded only, no rollout",
            ),
        ),
        "several turns, tools": (
            tested(
                "engines/test_turns.py::"
                "test_a_tools_tokens_reach_neither_filter_moments_probe_loss_nor_metrics",
                "cpu/rollout/test_tools.py::test_a_tool_speaks_between_the_policys_turns",
            ),
            tested(
                "engines/test_turns.py::"
                "test_a_tools_tokens_reach_neither_filter_moments_probe_loss_nor_metrics",
            ),
        ),
        "LoRA": (
            tested(
                "megatron/test_lora.py::test_decisions_are_those_of_float64",
                "megatron/test_lora.py::test_resuming_continues_bit_exactly",
                note="Megatron-Bridge; distributed optimizer",
            ),
            tested(
                "fsdp/test_engine.py::test_lora",
                "e2e/test_training.py::test_capo_trains_with_fsdp_and_lora",
            ),
        ),
        "mixture of experts, Qwen3-MoE": (
            tested(
                LAYOUTS,
                "megatron/test_kl_budget.py::test_layout",
                "megatron/test_experts.py::test_the_probe_leaves_what_routers_count_alone",
                "megatron/test_state.py::test_experts_continue_bit_exactly",
            ),
            tested("fsdp/test_engine.py::test_experts"),
        ),
        "router replay": (
            tested(
                LAYOUTS,
                "megatron/test_kl_budget.py::test_layout",
                "e2e/test_experts.py::test_the_rollouts_choices_are_replayed",
                note="`R2`; `R3` with the server `hf`",
            ),  # fmt: skip
            NONE,
        ),
        "float32": (tested(LAYOUTS), tested(FSDP)),
        "bfloat16": (tested(BFLOAT16), tested(BFLOAT16)),
        "float16": (
            asks(megatron("dtype", "float16")),
            asks("model_engine=dp", f"+{ACTOR}.fsdp_config.mixed_precision={{param_dtype: fp16}}"),
        ),
        "FP8": (UNTESTED, UNTESTED),
        "multi-token prediction": (
            asks(f"{MODEL}.mtp.enable_train=True"),
            asks("model_engine=dp", f"{MODEL}.mtp.enable_train=True"),
        ),
    },
    "Losses and interventions": {
        "verl's policy losses": (
            tested("megatron/test_engine.py::test_every_loss_of_verl_composes_with_the_filter"),
            UNTESTED,
        ),
        "`bypass_mode`": (
            asks(f"{ACTOR}.policy_loss.loss_mode=bypass_mode"),
            asks("model_engine=dp", f"{ACTOR}.policy_loss.loss_mode=bypass_mode"),
        ),
        "distillation": (
            asks("distillation.enabled=True"),
            asks("model_engine=dp", "distillation.enabled=True"),
        ),
        "soft weights, adaptive threshold": (
            tested("megatron/test_weighting.py::test_soft_weights_with_an_adaptive_threshold"),
            tested("fsdp/test_weighting.py::test_training_equals_the_reference"),
        ),
        "KL budget": (
            tested(
                "megatron/test_kl_budget.py::test_layout",
                "e2e/test_kl_budget.py::test_the_learning_rate_follows_the_measured_kl",
            ),
            tested("fsdp/test_kl_budget.py::test_layout"),
        ),
        "line search": (
            tested("megatron/test_kl_budget.py::test_line_search_steps_back_to_the_budget"),
            tested("fsdp/test_kl_budget.py::test_line_search_steps_back_to_the_budget"),
        ),
        "line search, `optimizer_cpu_offload`": (
            asks(
                f"+{ACTOR}.optim.override_optimizer_config.optimizer_cpu_offload=True",
                f"{ACTOR}.policy_loss.capo.kl_budget.line_search=2",
                capo="kl_budget",
            ),
            NONE,
        ),
        "curvature penalties": (
            tested("megatron/test_weighting.py::test_penalties"),
            tested("fsdp/test_weighting.py::test_training_equals_the_reference"),
        ),
        "penalties with a split sequence": (
            asks(
                megatron("context_parallel_size", 2), f"{ACTOR}.policy_loss.capo.policy_penalty=1"
            ),
            asks(
                "model_engine=dp",
                f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2",
                f"{ACTOR}.policy_loss.capo.policy_penalty=1",
            ),
        ),
        "granularity `sequence`, `batch` with a split sequence": (
            asks(
                megatron("context_parallel_size", 2),
                f"{ACTOR}.policy_loss.capo.granularity=sequence",
            ),
            asks(
                "model_engine=dp",
                f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2",
                f"{ACTOR}.policy_loss.capo.granularity=sequence",
            ),
        ),
    },
    "Trainers and rollouts": {
        "verl's synchronous V1 trainer": (
            tested("e2e/test_training.py::test_killed_broken_and_resumed"),
            tested("e2e/test_training.py::test_capo_trains_with_fsdp_and_lora"),
        ),
        "`colocate_async`": (
            tested("e2e/test_asynchronous.py::test_colocated_stopped_and_resumed"),
            says("runs; no test"),
        ),
        "`separate_async`": (says("runs; no test"), tested(ASYNC)),
        "legacy trainer": (
            asks("trainer.use_v1=False"),
            asks("model_engine=dp", "trainer.use_v1=False"),
        ),
        "rollout server on a CPU (`hf`)": (
            tested("e2e/test_training.py::test_killed_broken_and_resumed"),
            tested("e2e/test_training.py::test_capo_trains_with_fsdp_and_lora"),
        ),
        "vLLM's CPU build": (
            tested("e2e/test_vllm.py::test_the_weights_of_every_step_reach_vllm"),
            tested("e2e/test_vllm.py::test_the_weights_of_fsdp2_reach_vllm"),
        ),
        "vLLM, SGLang on a GPU": (
            says(
                "no run; vLLM's own parser takes the launchers' options",
                "launch/test_rollout_options.py::test_a_gpu_launcher",
            ),
            UNTESTED,
        ),
        "two nodes, Slurm, Ray": (
            tested(
                "slurm/test_interruptions.py::test_usr1_requeue_and_a_killed_raylet_change_nothing"
            ),
            UNTESTED,
        ),
    },
    "Checkpoints": {
        "resume, bit-exact": (
            tested("megatron/test_state.py::test_resuming_continues_bit_exactly"),
            tested("fsdp/test_state.py::test_resuming_continues_bit_exactly"),
        ),
        "under another layout": (
            tested(
                "megatron/test_state.py::"
                "test_resuming_continues_bit_exactly_and_under_another_layout"
            ),
            tested("fsdp/test_state.py::test_any_number_of_ranks_reads_the_moments"),
        ),
    },
}

BRIDGED = "megatron/test_bridges.py::test_three_steps_are_bit_identical"
RESUMED = "megatron/test_bridges.py::test_either_bridge_goes_on_from_a_checkpoint_of_the_other"

BRIDGES: dict[str, tuple[Cell, Cell]] = {
    "`vanilla_mbridge`": (says("`True`"), says("`False`, verl's default")),
    "installed with": (says("both stacks"), says("the GPU stack; needs Python 3.12")),
    "float32 and bfloat16: tensor with sequence, pipeline, virtual pipeline, data with distributed "
    "optimizer, context; bit-identical": (tested(BRIDGED), tested(BRIDGED)),
    "resume from a checkpoint of the other": (tested(RESUMED), tested(RESUMED)),
    "vocabulary that tensor parallelism does not divide": (
        says(
            "**refused**",
            "plugin/checks/test_sizes.py::"
            "test_a_vocabulary_that_nobody_pads_is_refused_before_the_start",
        ),
        tested(BRIDGED, note="with `should_pad_vocab=True`, else refused"),
    ),
    "tied embeddings with virtual pipeline": (
        tested(LAYOUTS),
        says(
            "**refused**",
            "plugin/checks/test_sizes.py::"
            "test_megatron_bridge_cannot_load_tied_embeddings_into_virtual_stages",
        ),
    ),
}
"""What HF weights go through in verl's Megatron engine."""


def refusal(cell: Cell) -> str | None:
    """The sentence of the start-up checks; None if they accept it."""
    from hydra import compose

    from capo_verl.plugin.checks.before_start import check_config

    overrides = cell.overrides or ()
    engine = [o for o in overrides if o.startswith("model_engine")] or ["model_engine=megatron"]
    rest = [o for o in overrides if not o.startswith("model_engine")]
    config = compose("ppo_trainer", overrides=[*engine, f"+capo={cell.capo}", *rest])
    try:
        check_config(config)
    except ValueError as e:
        return str(e)
    return None


def render_cell(cell: Cell) -> str:
    if cell.status:
        text = cell.status
    elif cell.overrides is not None and refusal(cell):
        text = "**refused**"
    elif cell.tests:
        text = "tested"
    else:
        text = "untested"
    if cell.note:
        text += f" ({cell.note})"
    files = sorted({file_of(test) for test in cell.tests})
    return ": ".join(filter(None, (text, ", ".join(f"`{f}`" for f in files))))


def render() -> str:
    """All tables. Needs verl; the platform is the CPU's."""
    os.environ["VERL_PLATFORM"] = "cpu"
    from hydra import initialize_config_module

    lines = []
    with initialize_config_module("verl.trainer.config", version_base=None):
        for group, rows in ROWS.items():
            lines += table(group, ("Megatron", "FSDP"), rows)
        lines += table("Bridges to Hugging Face weights", ("mbridge", "Megatron-Bridge"), BRIDGES)
    return "\n".join([*lines, *gpu_stack(json.loads(GPU_STACK.read_text()))]).rstrip()


def table(title: str, columns: tuple[str, str], rows: dict[str, tuple[Cell, Cell]]) -> list[str]:
    """A section with one table, and the empty line behind it."""
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---|---|---|"]
    lines += [f"| {what} | {render_cell(a)} | {render_cell(b)} |" for what, (a, b) in rows.items()]
    return [*lines, ""]


def gpu_stack(results: dict[str, Any]) -> list[str]:
    """The section of what ran with the versions of the GPU stack."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    told = textwrap.wrap(f"`bash scripts/test_gpu_stack.sh` with {versions}.", 100)
    columns = ("tests", "Megatron-Core", "bridge", "passed", "failed", "skipped", "commit", "date")
    keys = ("folder", "megatron_core", *columns[2:])
    rows = [[str(run[key]) for key in keys] for run in results["runs"]]
    body = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    missing = ", ".join(f"`{part}`" for part in results["not_run"]) or "nothing"
    rest = textwrap.wrap(f"Not run: {missing}.", 100, break_on_hyphens=False)
    return ["## The GPU stack on a CPU", "", *told, "", *body, "", *rest]


def file_of(test: str) -> str:
    """The file of a test, from ``tests/`` on."""
    file = test.split("::")[0]
    return f"engines/{file}" if file.startswith(("megatron/", "fsdp/")) else file


def missing_tests(tests: Path) -> list[str]:
    """Tests which a cell names and which do not exist."""
    named = {
        test
        for rows in (*ROWS.values(), BRIDGES)
        for cells in rows.values()
        for cell in cells
        for test in cell.tests
    }
    return sorted(
        test for test in named
        if not re.search(rf"^def {test.split('::')[1]}\(",
            (tests / file_of(test)).read_text(encoding="utf-8"), re.M)
    )  # fmt: skip


def written() -> str:
    """The page with its tables renewed."""
    return renewed(PAGE, render())


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
