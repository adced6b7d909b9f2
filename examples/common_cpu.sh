# shellcheck shell=bash disable=SC2034,SC2154
# SPDX-License-Identifier: Apache-2.0
# Sourced by the launchers for a CPU, after their user-adjustable block: the environment, and one array per concern.

default_save_freq=-1
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

export VERL_PLATFORM=cpu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1
export RAY_USAGE_STATS_ENABLED=0
export TOKENIZERS_PARALLELISM=false
# Ray would start one idle worker per logical CPU, each importing torch.
export RAY_enable_worker_prestart=0
export RAY_prestart_worker_first_driver=0
# Ray runs its workers at nice 15: on a busy machine they would hardly run at all.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
FORWARDED+=(VERL_PLATFORM OMP_NUM_THREADS PYTHONUNBUFFERED HF_HUB_OFFLINE TOKENIZERS_PARALLELISM
    MALLOC_ARENA_MAX MALLOC_MMAP_THRESHOLD_)

((nprocs % NNODES == 0)) || refuse "NPROCS=$nprocs ranks cannot be spread evenly over NNODES=$NNODES: change one of them"
NGPUS_PER_NODE=${NGPUS_PER_NODE:-$((nprocs / NNODES))}
if ((NGPUS_PER_NODE * NNODES != nprocs)); then
    refuse "NGPUS_PER_NODE=$NGPUS_PER_NODE times NNODES=$NNODES is not NPROCS=$nprocs: leave NGPUS_PER_NODE unset, or change one"
fi

train_files=${TRAIN_FILES:-"['$DATA_DIR/train.parquet']"}
val_files=${VAL_FILES:-"['$DATA_DIR/test.parquet']"}

DATA=(
    data.train_files="$train_files"
    data.val_files="$val_files"
    data.train_batch_size="$train_batch_size"
    data.max_prompt_length="$max_prompt_length"
    data.max_response_length="$max_response_length"
    data.dataloader_num_workers=0
)

MODEL=(
    actor_rollout_ref.model.path="'$MODEL_PATH'"
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
    actor_rollout_ref.rollout.name=hf
    actor_rollout_ref.rollout.n="$rollout_n"
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size="$nprocs"
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
)

# All or nothing, so that the mean training reward is the training accuracy.
REWARD=(
    reward.num_workers=1
    reward.custom_reward_function.path=pkg://capo_verl.quickstart.task
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.partial_credit=False
)

TRAINER=(
    trainer.logger='["console","file"]'
    trainer.project_name="$project_name"
    trainer.experiment_name="$experiment_name"
    trainer.n_gpus_per_node="$NGPUS_PER_NODE"
    trainer.nnodes="$NNODES"
    trainer.val_before_train="$val_before_train"
    trainer.test_freq="$test_freq"
    trainer.total_training_steps="$total_training_steps"
    trainer.v1.sampler.custom_sampler.path=pkg://capo_verl.cpu.replay_buffer
    trainer.v1.sampler.custom_sampler.name=FastReplayBuffer
)

EXTRA=(
    model_engine="$model_engine"
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
)

# Ray counts logical CPUs and "GPUs" (here: one per rank of the trainer); they need not exist.
LOCAL_RAY=(
    ray_kwargs.ray_init.num_cpus=12
    +ray_kwargs.ray_init.include_dashboard=False
    +ray_kwargs.ray_init.num_gpus="$nprocs"
)
