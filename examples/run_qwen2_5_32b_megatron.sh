#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO or CAPO | Qwen2.5-32B, MATH | vLLM, SGLang rollout | Megatron training | H100-80GB
#
#   capo-verl data math --output data     # data/math/train.parquet and test.parquet
#   bash examples/run_qwen2_5_32b_megatron.sh                  # GRPO
#   CAPO=grpo bash examples/run_qwen2_5_32b_megatron.sh        # CAPO
#   REGIME=aggressive CAPO=grpo bash examples/run_qwen2_5_32b_megatron.sh
#   DRY_RUN=1 bash examples/run_qwen2_5_32b_megatron.sh        # the configuration and the plan
#
# Layouts for H100-80GB (79.6 GiB; 6 of them are kept free for CUDA, NCCL and fragmentation), as
# `capo-verl plan` estimates them for CAPO=grpo, REGIME=conservative: GiB per GPU in the four phases
# and of CAPO's moments, GiB of host memory per node for what is offloaded, thousands of tokens for
# which a rollout replica has room. The first is the default.
#
#   nodes                   rollout            weight   log-              CAPO            KV
#   x GPUs   TP  PP         TP    rollout     sync    probs   update  moments   host  tokens
#   2 x 8     8   1        4       47.8     24.9     11.6     51.5      0.7    250      532
#   4 x 8     8   1        4       47.8     24.9     11.6     40.1      0.7    158      532
#   4 x 8     4   2        4       47.8     24.9     15.5     43.9      1.5    164      532
#
# Further variables: examples/common.sh and examples/common_megatron_gpu.sh.

set -euo pipefail

# ---- user-adjustable; common_megatron_gpu.sh has what does not depend on the model ----
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-32B}

NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-2}}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}

actor_tp=${ACTOR_TP:-8}
actor_pp=${ACTOR_PP:-1}
rollout_tp=${ROLLOUT_TP:-4}
# ---- end user-adjustable ----

# shellcheck source=examples/common_megatron_gpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_megatron_gpu.sh"
launch "$@"
