#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO or CAPO | Qwen3-30B-A3B, a mixture of experts | MATH | vLLM, SGLang rollout |
# Megatron training | H100-80GB
#
#   capo-verl data math --output data     # data/math/train.parquet and test.parquet
#   bash examples/run_qwen3_30b_a3b_megatron.sh                  # GRPO
#   CAPO=grpo bash examples/run_qwen3_30b_a3b_megatron.sh        # CAPO
#   REGIME=aggressive CAPO=grpo bash examples/run_qwen3_30b_a3b_megatron.sh
#   DRY_RUN=1 bash examples/run_qwen3_30b_a3b_megatron.sh        # the configuration and the plan
#
# Layouts for H100-80GB (79.6 GiB; 6 of them are kept free for CUDA, NCCL and fragmentation), as
# `capo-verl plan` estimates them for CAPO=grpo, REGIME=conservative: GiB per GPU in the four phases
# and of CAPO's moments, GiB of host memory per node for what is offloaded, thousands of tokens for
# which a rollout replica has room. The experts of a layer are spread over eight GPUs (ACTOR_EP),
# each of them whole (ACTOR_ETP). The first is the default.
#
#   nodes                   rollout            weight   log-              CAPO            KV
#   x GPUs   TP  PP         TP    rollout     sync    probs   update  moments   host  tokens
#   2 x 8     4   1        4       47.8     23.7     15.0     50.9      0.6    235    1,464
#   4 x 8     4   1        4       47.8     23.7     15.0     40.2      0.6    150    1,464
#   4 x 8     2   2        4       47.8     20.3     19.1     36.1      1.2    127    1,464
#
# Further variables: examples/common.sh and examples/common_megatron_gpu.sh.

set -euo pipefail

# ---- user-adjustable; common_megatron_gpu.sh has what does not depend on the model ----
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-30B-A3B}

NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-2}}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}

actor_tp=${ACTOR_TP:-4}
actor_pp=${ACTOR_PP:-1}
actor_ep=${ACTOR_EP:-8}
actor_etp=${ACTOR_ETP:-1}
rollout_tp=${ROLLOUT_TP:-4}
# ---- end user-adjustable ----

# shellcheck source=examples/common_megatron_gpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_megatron_gpu.sh"

ACTOR+=(
    actor_rollout_ref.actor.megatron.expert_model_parallel_size="$actor_ep"
    actor_rollout_ref.actor.megatron.expert_tensor_parallel_size="$actor_etp"
    # In bfloat16 experts of a token tie, and the rollout engine chooses others.
    +actor_rollout_ref.actor.megatron.override_transformer_config.moe_router_dtype=fp32
)
launch "$@"
