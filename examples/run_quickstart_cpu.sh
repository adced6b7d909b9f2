#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO or CAPO | small Qwen2, spell_backward | Hugging Face rollout | Megatron training, TP2, or FSDP, 2 ranks | CPU
#
#   capo-verl quickstart --prepare-only        # makes the data and the model, prints the two paths to export
#   bash examples/run_quickstart_cpu.sh                                          # GRPO
#   CAPO=actor_rollout_ref.actor.policy_loss.capo
#   bash examples/run_quickstart_cpu.sh +capo=grpo $CAPO.policy_shift_max=5e-4 $CAPO.objective_shift_max=6e-2   # CAPO
#   MODEL_ENGINE=dp bash examples/run_quickstart_cpu.sh                          # with verl's FSDP engine

set -euo pipefail

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

# ---- user-adjustable ----
DATA_DIR=${DATA_DIR:?"set DATA_DIR and MODEL_PATH: 'capo-verl quickstart --prepare-only' prints them"}
MODEL_PATH=${MODEL_PATH:?"set DATA_DIR and MODEL_PATH: 'capo-verl quickstart --prepare-only' prints them"}
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

project_name=${PROJECT_NAME:-capo_quickstart}
experiment_name=${EXPERIMENT_NAME:-spell_backward_megatron_cpu}
# ---- end user-adjustable ----

mkdir -p "$OUTPUT_DIR"
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$OUTPUT_DIR/metrics.jsonl}

########################### parameter arrays ###########################

DATA=(
    algorithm.adv_estimator=grpo
    algorithm.norm_adv_by_std_in_grpo=True
    algorithm.use_kl_in_reward=False
    data.train_files="['$DATA_DIR/train.parquet']"
    data.val_files="['$DATA_DIR/test.parquet']"
    data.train_batch_size=${train_batch_size}
    data.max_prompt_length=${max_prompt_length}
    data.max_response_length=${max_response_length}
    data.dataloader_num_workers=0
)

MODEL=(
    actor_rollout_ref.model.path="$MODEL_PATH"
    actor_rollout_ref.model.use_remove_padding=False
)

ACTOR=(
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.optim.lr=${actor_lr}
    actor_rollout_ref.actor.optim.lr_warmup_steps=${lr_warmup_steps}
    actor_rollout_ref.actor.ppo_mini_batch_size=${train_batch_size}
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=${micro_batch_size}
)
if [[ $model_engine == megatron ]]; then
    ACTOR+=(
        actor_rollout_ref.actor.megatron.tensor_model_parallel_size=${actor_tp}
        actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=${actor_pp}
    )
else
    ACTOR+=(actor_rollout_ref.actor.strategy=${actor_strategy})
fi

ROLLOUT=(
    actor_rollout_ref.rollout.name=hf
    actor_rollout_ref.rollout.n=${rollout_n}
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size=${nprocs}
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=${micro_batch_size}
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
    trainer.project_name=${project_name}
    trainer.experiment_name=${experiment_name}
    trainer.n_gpus_per_node=${nprocs}
    trainer.nnodes=1
    trainer.val_before_train=True
    trainer.test_freq=${test_freq}
    trainer.save_freq=-1
    trainer.resume_mode=disable
    trainer.default_local_dir="$OUTPUT_DIR/checkpoints"
    trainer.total_training_steps=${total_training_steps}
    trainer.v1.sampler.custom_sampler.path=pkg://capo_verl.cpu.replay_buffer
    trainer.v1.sampler.custom_sampler.name=FastReplayBuffer
)

# Ray counts logical CPUs and "GPUs" (here: one per rank of the trainer); they need not exist.
EXTRA=(
    model_engine=${model_engine}
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    ray_kwargs.ray_init.num_cpus=12
    +ray_kwargs.ray_init.include_dashboard=False
    +ray_kwargs.ray_init.num_gpus=${nprocs}
    hydra.run.dir="$OUTPUT_DIR/hydra"
)

########################### launch ###########################
exec "${PYTHON:-python3}" -W ignore -m verl.trainer.main_ppo \
    "${DATA[@]}" \
    "${MODEL[@]}" \
    "${ACTOR[@]}" \
    "${ROLLOUT[@]}" \
    "${REWARD[@]}" \
    "${TRAINER[@]}" \
    "${EXTRA[@]}" \
    "$@"
