# shellcheck shell=bash disable=SC2034,SC2154
# SPDX-License-Identifier: Apache-2.0
# Sourced by the launchers for a CPU, after their user-adjustable block: one array per concern.
#
# INFER_BACKEND          hf (default) or vllm: vLLM's CPU build (docs/quickstart.md)
# ROLLOUT_KV_CACHE_MIB   MiB of vLLM's cache on each rank (default 64)
# TRAINER_MODE           sync (default), colocate_async or separate_async (docs/asynchronous.md)
# PARAMETER_SYNC_STEP    separate_async: optimizer steps between two updates of the rollout servers
#                        (default 1); divides TRAIN_BATCH_SIZE
# ROLLOUT_NPROCS         separate_async: ranks of rollout servers of their own (default 1)

default_save_freq=-1
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TRAINER_MODE=${TRAINER_MODE:-sync}
mini_batch_size=$train_batch_size
if [[ $TRAINER_MODE == separate_async ]]; then
    PARAMETER_SYNC_STEP=${PARAMETER_SYNC_STEP:-1} ROLLOUT_NPROCS=${ROLLOUT_NPROCS:-1}
    for name in PARAMETER_SYNC_STEP ROLLOUT_NPROCS; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || refuse "$name=${!name}: set it to a positive integer"
    done
    ((train_batch_size % PARAMETER_SYNC_STEP == 0)) ||
        refuse "PARAMETER_SYNC_STEP=$PARAMETER_SYNC_STEP does not divide" \
            "TRAIN_BATCH_SIZE=$train_batch_size: change one"
    mini_batch_size=$((train_batch_size / PARAMETER_SYNC_STEP))
    of_a_rank=$((mini_batch_size * rollout_n * model_parallel / nprocs))
    ((micro_batch_size <= of_a_rank)) || micro_batch_size=$of_a_rank
else
    ROLLOUT_NPROCS=0
fi
use_cpu $((nprocs + ROLLOUT_NPROCS))

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
    actor_rollout_ref.actor.ppo_mini_batch_size="$mini_batch_size"
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

if [[ $TRAINER_MODE == separate_async ]]; then
    ROLLOUT+=(
        actor_rollout_ref.rollout.nnodes=1
        actor_rollout_ref.rollout.n_gpus_per_node="$ROLLOUT_NPROCS"
        actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_NPROCS"
        actor_rollout_ref.rollout.checkpoint_engine.backend=gloo
        trainer.v1.separate_async.parameter_sync_step="$PARAMETER_SYNC_STEP"
    )
fi

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
    trainer.v1.trainer_mode="$TRAINER_MODE"
    trainer.val_before_train="$val_before_train"
    trainer.test_freq="$test_freq"
    trainer.total_training_steps="$total_training_steps"
)

EXTRA=(
    model_engine="$model_engine"
    "${ON_CPU[@]}"
)
