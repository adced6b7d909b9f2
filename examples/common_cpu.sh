# shellcheck shell=bash disable=SC2034,SC2154
# SPDX-License-Identifier: Apache-2.0
# Sourced by the launchers for a CPU, after their user-adjustable block: one array per concern.
#
# INFER_BACKEND          hf (default) or vllm: vLLM's CPU build (docs/quickstart.md)
# ROLLOUT_KV_CACHE_MIB   MiB of vLLM's cache on each rank (default 64)

default_save_freq=-1
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_cpu "$nprocs"

# Ranks of the trainer, spread over the nodes.
((nprocs % NNODES == 0)) ||
    refuse "NPROCS=$nprocs ranks cannot be spread evenly over NNODES=$NNODES: change one of them"
NGPUS_PER_NODE=${NGPUS_PER_NODE:-$((nprocs / NNODES))}
if ((NGPUS_PER_NODE * NNODES != nprocs)); then
    refuse "NGPUS_PER_NODE=$NGPUS_PER_NODE times NNODES=$NNODES is not NPROCS=$nprocs: leave" \
        "NGPUS_PER_NODE unset, or change one"
fi

INFER_BACKEND=${INFER_BACKEND:-hf}
ROLLOUT_KV_CACHE_MIB=${ROLLOUT_KV_CACHE_MIB:-64}

train_files=${TRAIN_FILES:-"[$(quoted "$DATA_DIR/train.parquet")]"}
val_files=${VAL_FILES:-"[$(quoted "$DATA_DIR/test.parquet")]"}

DATA=(
    data.train_files="$train_files"
    data.val_files="$val_files"
    data.train_batch_size="$train_batch_size"
    data.max_prompt_length="$max_prompt_length"
    data.max_response_length="$max_response_length"
)

MODEL=(
    actor_rollout_ref.model.path="$(quoted "$MODEL_PATH")"
    actor_rollout_ref.model.use_remove_padding="${USE_REMOVE_PADDING:-False}"
)

ACTOR=(
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.optim.lr="$actor_lr"
    actor_rollout_ref.actor.optim.lr_warmup_steps="$lr_warmup_steps"
    actor_rollout_ref.actor.ppo_mini_batch_size="$train_batch_size"
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="$micro_batch_size"
)
if [[ $model_engine == megatron ]]; then
    ACTOR+=(
        actor_rollout_ref.actor.megatron.tensor_model_parallel_size="$actor_tp"
        actor_rollout_ref.actor.megatron.pipeline_model_parallel_size="$actor_pp"
    )
else
    ACTOR+=(actor_rollout_ref.actor.strategy="$actor_strategy")
fi

ROLLOUT=(
    actor_rollout_ref.rollout.name="$INFER_BACKEND"
    actor_rollout_ref.rollout.n="$rollout_n"
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size="$nprocs"
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
)

case $INFER_BACKEND in
    hf) ;;
    vllm)
        [[ $ROLLOUT_KV_CACHE_MIB =~ ^[1-9][0-9]*$ ]] ||
            refuse "ROLLOUT_KV_CACHE_MIB=$ROLLOUT_KV_CACHE_MIB: set it to a number of MiB"
        # It cannot sleep and has no CUDA graphs on a CPU. Without a size of its own the cache would
        # be a share of the machine's memory, on every rank.
        ROLLOUT+=(
            actor_rollout_ref.rollout.tensor_model_parallel_size="$NGPUS_PER_NODE"
            actor_rollout_ref.rollout.dtype=float32
            actor_rollout_ref.rollout.enforce_eager=True
            actor_rollout_ref.rollout.free_cache_engine=False
            +actor_rollout_ref.rollout.enable_sleep_mode=False
            actor_rollout_ref.rollout.max_model_len=$((max_prompt_length + max_response_length))
            actor_rollout_ref.rollout.max_num_seqs=64
            +actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=$((
                ROLLOUT_KV_CACHE_MIB << 20))
            actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=256
        )
        ;;
    *) refuse "INFER_BACKEND=$INFER_BACKEND: choose one of hf, vllm" ;;
esac

# All or nothing, so that the mean training reward is the training accuracy.
REWARD=(
    reward.num_workers=1
    reward.custom_reward_function.path=pkg://capo_verl.data.gym
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.partial_credit=False
)

TRAINER=(
    trainer.logger='["console","file"]'
    trainer.project_name="$(quoted "$project_name")"
    trainer.experiment_name="$(quoted "$experiment_name")"
    trainer.n_gpus_per_node="$NGPUS_PER_NODE"
    trainer.nnodes="$NNODES"
    trainer.val_before_train="$val_before_train"
    trainer.test_freq="$test_freq"
    trainer.total_training_steps="$total_training_steps"
)

EXTRA=(
    model_engine="$model_engine"
    "${ON_CPU[@]}"
)
