# shellcheck shell=bash disable=SC2034,SC2154
# SPDX-License-Identifier: Apache-2.0
# Sourced by the Megatron launchers for GPUs, after their user-adjustable block: what does not
# depend on the model, the paper's regimes, one array per concern.
#
# REGIME          conservative (default) or aggressive: the paper's two sets of hyper-parameters
# LOSS_MODE       verl's policy loss (default vanilla), e.g. gspo, cispo, dppo_tv, or capo: the
#                 paper's, without clipping
# INFER_BACKEND   vllm (default), sglang, or hf: everything on CPUs, to try a launcher with a small
#                 model where no GPU is
# TRAIN_FILES, VAL_FILES   parquet in verl's schema (default: train.parquet and test.parquet in
#                          DATA_DIR)

# ---- user-adjustable ----
DATA_DIR=${DATA_DIR:-data/math}
OUTPUT_DIR=${OUTPUT_DIR:-}  # default: outputs/ and the name of the experiment

REGIME=${REGIME:-conservative}
LOSS_MODE=${LOSS_MODE:-vanilla}
INFER_BACKEND=${INFER_BACKEND:-vllm}

actor_cp=${ACTOR_CP:-1}
# Tokens of one micro-batch.
ppo_max_token_len_per_gpu=${PPO_MAX_TOKEN_LEN_PER_GPU:-16384}
rollout_gpu_mem_util=${ROLLOUT_GPU_MEM_UTIL:-0.6}

project_name=${PROJECT_NAME:-capo_verl}
experiment_name=${EXPERIMENT_NAME:-}  # default: model, CAPO, REGIME; LOSS_MODE and SEED if set
# ---- end user-adjustable ----

default_save_freq=10
model_engine=megatron

# What tells one experiment from another.
default_experiment_name() {
    local name
    name=$(basename "$MODEL_PATH" | tr '[:upper:]' '[:lower:]' | tr -c '[:alnum:]\n' _)
    name+=_${CAPO}_$REGIME
    if [[ $LOSS_MODE != vanilla ]]; then name+=_$LOSS_MODE; fi
    if [[ -n $RIVAL ]]; then name+=_$RIVAL; fi
    if [[ -n ${SEED:-} ]]; then name+=_seed$SEED; fi
    echo "$name"
}

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# arXiv 2510.00819. Both: eight completions per prompt, cosine schedule with 10 % warm-up,
# temperature 1, no KL, one update per batch. Conservative takes one pass over MATH's 7,500 training
# problems: 59,904 completions.
case $REGIME in
    conservative) regime_lr=3e-6 regime_prompts=144 regime_steps=52 ;;
    aggressive) regime_lr=1.5e-5 regime_prompts=12 regime_steps=100 ;;
    *) refuse "REGIME=$REGIME: choose one of conservative, aggressive" ;;
esac
actor_lr=${ACTOR_LR:-$regime_lr}
train_batch_size=${TRAIN_BATCH_SIZE:-$regime_prompts}
total_training_steps=${TOTAL_TRAINING_STEPS:-$regime_steps}
rollout_n=${ROLLOUT_N:-8}
max_prompt_length=${MAX_PROMPT_LENGTH:-512}
max_response_length=${MAX_RESPONSE_LENGTH:-1024}

# Kernels of one stream at a time: communication starts before the computation it overlaps with
# (Hopper and older).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export PYTHONUNBUFFERED=1
# verl hands it on only if the driver's own machine has such a GPU; TOKENIZERS_PARALLELISM and the
# like are verl's.
FORWARDED+=(CUDA_DEVICE_MAX_CONNECTIONS PYTHONUNBUFFERED HF_HOME HF_HUB_OFFLINE)

case $INFER_BACKEND in
    vllm | sglang) ;;
    hf)
        use_cpu $((NNODES * NGPUS_PER_NODE))
        rollout_tp=$((NNODES * NGPUS_PER_NODE))  # one server
        ;;
    *) refuse "INFER_BACKEND=$INFER_BACKEND: choose one of vllm, sglang, hf" ;;
esac

train_files=${TRAIN_FILES:-"[$(quoted "$DATA_DIR/train.parquet")]"}
val_files=${VAL_FILES:-"[$(quoted "$DATA_DIR/test.parquet")]"}

DATA=(
    data.train_files="$train_files"
    data.val_files="$val_files"
    data.train_batch_size="$train_batch_size"
    data.max_prompt_length="$max_prompt_length"
    data.max_response_length="$max_response_length"
    data.filter_overlong_prompts=True
)

MODEL=(
    actor_rollout_ref.model.path="$(quoted "$MODEL_PATH")"
    actor_rollout_ref.model.use_remove_padding=True
)

# A rival brings its own loss, and an explicit one would win over it.
LOSS=(actor_rollout_ref.actor.policy_loss.loss_mode="$LOSS_MODE")
if [[ -n $RIVAL ]]; then LOSS=(); fi

ACTOR=(
    ${LOSS[@]+"${LOSS[@]}"}
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.optim.lr="$actor_lr"
    actor_rollout_ref.actor.optim.lr_decay_style=cosine
    actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1
    actor_rollout_ref.actor.ppo_mini_batch_size="${PPO_MINI_BATCH_SIZE:-$train_batch_size}"
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$ppo_max_token_len_per_gpu"
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size="$actor_tp"
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size="$actor_pp"
    actor_rollout_ref.actor.megatron.context_parallel_size="$actor_cp"
    actor_rollout_ref.actor.megatron.sequence_parallel=True
    actor_rollout_ref.actor.megatron.use_distributed_optimizer=True
    # What training holds leaves the GPU while the rollout engine generates.
    actor_rollout_ref.actor.megatron.param_offload="${OFFLOAD:-True}"
    actor_rollout_ref.actor.megatron.optimizer_offload="${OFFLOAD:-True}"
    # Only a layer's input is kept; without it the activations of a micro-batch take more than all
    # states.
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1
)

ROLLOUT=(
    actor_rollout_ref.rollout.name="$INFER_BACKEND"
    actor_rollout_ref.rollout.n="$rollout_n"
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size="$rollout_tp"
    actor_rollout_ref.rollout.gpu_memory_utilization="$rollout_gpu_mem_util"
    # Otherwise as long as the model allows.
    actor_rollout_ref.rollout.max_model_len=$((max_prompt_length + max_response_length))
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$ppo_max_token_len_per_gpu"
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
)

# The paper has no KL term, so there is no reference model; for those who add one
# (actor.use_kl_loss=True).
REF=(
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$ppo_max_token_len_per_gpu"
    actor_rollout_ref.ref.megatron.param_offload=True
)

reward_path=${REWARD_PATH:-pkg://capo_verl.data.rewards.math_answers}
REWARD=(
    reward.custom_reward_function.path="$(quoted "$reward_path")"
    reward.custom_reward_function.name="${REWARD_NAME:-compute_score}"
)

TRAINER=(
    trainer.logger="${LOGGER:-[console,file]}"
    trainer.project_name="$(quoted "$project_name")"
    trainer.experiment_name="$(quoted "$experiment_name")"
    trainer.n_gpus_per_node="$NGPUS_PER_NODE"
    trainer.nnodes="$NNODES"
    trainer.val_before_train="${VAL_BEFORE_TRAIN:-True}"
    trainer.test_freq="${TEST_FREQ:-10}"
    trainer.total_epochs="${TOTAL_EPOCHS:-1000}"
    trainer.total_training_steps="$total_training_steps"
)

EXTRA=(
    model_engine="$model_engine"
    ${ON_CPU[@]+"${ON_CPU[@]}"}
)
