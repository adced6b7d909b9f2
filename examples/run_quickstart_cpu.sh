#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO or CAPO | small Qwen2, spell_backward | Hugging Face, vLLM rollout | Megatron training, TP2,
# or FSDP, 2 ranks | CPU
#
#   capo-verl quickstart --prepare-only    # makes data and model, prints the paths to export
#   bash examples/run_quickstart_cpu.sh                    # GRPO
#   KNOBS=actor_rollout_ref.actor.policy_loss.capo
#   CAPO=grpo bash examples/run_quickstart_cpu.sh \
#       $KNOBS.policy_shift_max=5e-4 $KNOBS.objective_shift_max=6e-2    # CAPO
#   MODEL_ENGINE=dp bash examples/run_quickstart_cpu.sh    # with verl's FSDP engine
#   INFER_BACKEND=vllm bash examples/run_quickstart_cpu.sh    # vLLM's CPU build generates
#   DRY_RUN=1 bash examples/run_quickstart_cpu.sh          # prints what it would do
#
# Further variables (nodes, checkpoints, resuming): examples/common.sh.

set -euo pipefail

# ---- user-adjustable ----
hint="set DATA_DIR and MODEL_PATH: 'capo-verl quickstart --prepare-only' prints them"
DATA_DIR=${DATA_DIR:?$hint}
MODEL_PATH=${MODEL_PATH:?$hint}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/quickstart/standalone}

train_batch_size=${TRAIN_BATCH_SIZE:-8}
rollout_n=${ROLLOUT_N:-8}
max_prompt_length=${MAX_PROMPT_LENGTH:-32}
max_response_length=${MAX_RESPONSE_LENGTH:-12}

actor_lr=${ACTOR_LR:-2e-4}
lr_warmup_steps=${LR_WARMUP_STEPS:-5}

model_engine=${MODEL_ENGINE:-megatron}  # or dp: FSDP, which ACTOR_STRATEGY chooses (fsdp2, fsdp)
actor_strategy=${ACTOR_STRATEGY:-fsdp2}
actor_tp=${ACTOR_TP:-2}
actor_pp=${ACTOR_PP:-1}
if [[ $model_engine == megatron ]]; then
    model_parallel=$((actor_tp * actor_pp))
    nprocs=${NPROCS:-$model_parallel}
else
    model_parallel=1
    nprocs=${NPROCS:-2}
fi
# One micro-batch per update: the whole batch is a few hundred kilobytes.
micro_batch_size=${MICRO_BATCH_SIZE:-$((train_batch_size * rollout_n * model_parallel / nprocs))}

total_training_steps=${TOTAL_TRAINING_STEPS:-60}
test_freq=${TEST_FREQ:-10}
val_before_train=${VAL_BEFORE_TRAIN:-True}

project_name=${PROJECT_NAME:-capo_quickstart}
experiment_name=${EXPERIMENT_NAME:-spell_backward_megatron_cpu}
# ---- end user-adjustable ----

# shellcheck source=examples/common_cpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_cpu.sh"
launch "$@"
