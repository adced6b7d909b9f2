#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO or CAPO | Qwen2.5-Math-7B, MATH | vLLM, SGLang rollout | Megatron training | H100-80GB
#
#   capo-verl data math --output data     # data/math/train.parquet and test.parquet
#   bash examples/run_qwen2_5_math_7b_megatron.sh                  # GRPO
#   CAPO=grpo bash examples/run_qwen2_5_math_7b_megatron.sh        # CAPO
#   REGIME=aggressive CAPO=grpo bash examples/run_qwen2_5_math_7b_megatron.sh
#   DRY_RUN=1 bash examples/run_qwen2_5_math_7b_megatron.sh        # the configuration and the plan
#
# Layouts for H100-80GB (79.6 GiB; 6 of them are kept free for CUDA, NCCL and fragmentation), as
# `capo-verl plan` estimates them for CAPO=grpo, REGIME=conservative: GiB per GPU in the four phases
# and of CAPO's moments, GiB of host memory per node for what is offloaded, thousands of tokens for
# which a rollout replica has room. The first is the default.
#
#   nodes                   rollout            weight   log-              CAPO            KV
#   x GPUs   TP  PP         TP    rollout     sync    probs   update  moments   host  tokens
#   1 x 8     2   1        1       47.8     23.3     22.2     47.5      2.0    158      628
#   1 x 4     2   1        1       47.8     23.3     22.2     58.2      2.0    122      628
#   4 x 8     2   1        1       47.8     23.3     22.2     38.5      2.0     94      628
#
# Further variables: examples/common.sh and examples/common_megatron_gpu.sh.

set -euo pipefail

# ---- user-adjustable; common_megatron_gpu.sh has what does not depend on the model ----
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-Math-7B}

NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}

actor_tp=${ACTOR_TP:-2}
actor_pp=${ACTOR_PP:-1}
rollout_tp=${ROLLOUT_TP:-1}
# ---- end user-adjustable ----

# shellcheck source=examples/common_megatron_gpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_megatron_gpu.sh"
launch "$@"
