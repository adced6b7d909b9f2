# shellcheck shell=bash disable=SC2034,SC2154
# SPDX-License-Identifier: Apache-2.0
# Sourced by common_cpu.sh and common_megatron_gpu.sh: what every launcher shares.
#
# CAPO               off (default), grpo, dr_grpo, reinforce, soft, kl_budget or track; the same as
#                    +capo=NAME on the command line
# DRY_RUN            1: print the resolved configuration and the plan, start nothing; strict: look
#                    at data and folders, too
# GPU_MEMORY_GIB     GiB of a GPU, for the plan (default: 79.6, an H100-80GB; strict: of the
#                    smallest that nvidia-smi shows)
# CAPO_PLAN          note: a plan that does not fit is printed, not refused
# SEED               order of the data and sampling (default: verl's)
# NNODES             nodes of the run (default: those of the Slurm job, else 1)
# OUTPUT_DIR         checkpoints, metrics, Hydra's copy of the configuration; on a file system that
#                    all nodes share; one folder per experiment (a run that would continue another's
#                    checkpoints is refused)
# SAVE_FREQ          write a checkpoint every so many steps; -1: none
# RESUME_MODE        auto (continue from the latest checkpoint in OUTPUT_DIR, if any), disable, or
#                    resume_path
# MAX_CKPT_TO_KEEP   older checkpoints are removed; null keeps all
# VERL_FILE_LOGGER_PATH   metrics (default: $OUTPUT_DIR/metrics.jsonl); where it exists,
#                         metrics.2.jsonl and so on
# RAY_ADDRESS        join this Ray cluster instead of starting one
# PYTHON             interpreter (default python3)

# refuse WORDS...: one line, exit code 2.
refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# quoted TEXT: a value for Hydra, whatever the text contains; only quotes, and backslashes before
# one or at the end, are special in it.
quoted() {
    local text=$1 plain slashes result=
    while [[ -n $text ]]; do
        plain=${text%%[\\\']*}
        text=${text#"$plain"}
        slashes=${text%%[!\\]*}
        text=${text#"$slashes"}
        result+=$plain$slashes
        if [[ -z $text || $text == \'* ]]; then result+=$slashes; fi
        if [[ $text == \'* ]]; then
            result+=\\\'
            text=${text#?}
        fi
    done
    printf "'%s'" "$result"
}

# refuse_interpolation NAME...: OmegaConf would take ${...} in a value as a reference, however it is
# quoted: verl resolves its configuration more than once.
refuse_interpolation() {
    local name
    for name in "$@"; do
        if [[ ${!name:-} == *"\${"* ]]; then
            refuse "$name=${!name} has \${ in it, which OmegaConf resolves: choose another name"
        fi
    done
}

# choose_algorithm "$@": fills ALGORITHM. A preset brings its own settings, and explicit ones would
# win over it.
choose_algorithm() {
    local argument on_command_line=
    for argument in "$@"; do
        if [[ $argument == +capo=* ]]; then on_command_line=${argument#+capo=}; fi
    done
    if [[ -n $on_command_line ]]; then
        if [[ $CAPO != off && $CAPO != "$on_command_line" ]]; then
            refuse "CAPO=$CAPO and +capo=$on_command_line contradict each other: drop one of them"
        fi
        CAPO=$on_command_line
    fi
    ALGORITHM=(algorithm.use_kl_in_reward=False)
    case $CAPO in
        grpo | dr_grpo | reinforce) ;;
        off | track | soft | kl_budget)
            ALGORITHM+=(
                algorithm.adv_estimator=grpo
                algorithm.norm_adv_by_std_in_grpo=True
                actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
            )
            ;;
        *)
            refuse "CAPO=$CAPO: choose one of grpo, dr_grpo, reinforce, soft, kl_budget, track, off"
            ;;
    esac
    if [[ $CAPO != off && -z $on_command_line ]]; then ALGORITHM+=("+capo=$CAPO"); fi
}

# rival_in "$@": the NAME of a +rival=NAME.
rival_in() {
    local argument
    for argument in "$@"; do
        if [[ $argument == +rival=* ]]; then echo "${argument#+rival=}"; fi
    done
}

CAPO=${CAPO:-off}
choose_algorithm "$@"  # a sourced file sees the launcher's arguments
RIVAL=$(rival_in "$@")
if [[ -n $RIVAL && ${LOSS_MODE:-vanilla} != vanilla ]]; then
    refuse "LOSS_MODE=$LOSS_MODE and +rival=$RIVAL contradict each other: drop one of them"
fi
NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || refuse "NNODES=$NNODES: set it to the number of nodes"
save_freq=${SAVE_FREQ:-$default_save_freq}
if [[ $save_freq =~ ^[1-9] ]]; then default_resume_mode=auto; else default_resume_mode=disable; fi
resume_mode=${RESUME_MODE:-$default_resume_mode}
experiment_name=${experiment_name:-$(default_experiment_name)}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$experiment_name}
# Ray's workers may have another working directory.
[[ $OUTPUT_DIR == /* ]] || OUTPUT_DIR=$PWD/$OUTPUT_DIR

REF=()
ON_CPU=()

CHECKPOINTS=(
    trainer.default_local_dir="$(quoted "$OUTPUT_DIR/checkpoints")"
    trainer.save_freq="$save_freq"
    trainer.resume_mode="$resume_mode"
    trainer.max_actor_ckpt_to_keep="${MAX_CKPT_TO_KEEP:-null}"
)
# verl would start Megatron's schedule anew after a resume; FSDP's is always restored.
if [[ $model_engine == megatron ]]; then
    CHECKPOINTS+=(actor_rollout_ref.actor.optim.use_checkpoint_opt_param_scheduler=True)
fi

SEEDS=()
if [[ -n ${SEED:-} ]]; then SEEDS=(data.seed="$SEED" actor_rollout_ref.rollout.seed="$SEED"); fi

# Environment variables that the workers need. Those of a cluster that already runs have its
# environment, not ours.
FORWARDED=(VERL_FILE_LOGGER_PATH)
# For a cluster that starts with the run.
LOCAL_RAY=(+ray_kwargs.ray_init.include_dashboard=False)

# use_cpu RANKS: verl on CPUs, with the engines and the rollout server of capo_verl/cpu.
use_cpu() {
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
    # Ray counts logical CPUs and "GPUs" (here: one per rank of the trainer); they need not exist.
    LOCAL_RAY+=(ray_kwargs.ray_init.num_cpus=12 "+ray_kwargs.ray_init.num_gpus=$1")
    ON_CPU=(
        data.dataloader_num_workers=0
        transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    )
}

# metrics_of_this_attempt FILE: the first of FILE.jsonl, FILE.2.jsonl, ... that is free; verl
# empties the one it writes to.
metrics_of_this_attempt() {
    local file=$1 name=${1##*/} attempt=2 ending=
    if [[ $name == ?*.* ]]; then ending=.${name##*.}; fi
    while [[ -e $file ]]; do
        file=${1%"$ending"}.$attempt$ending
        attempt=$((attempt + 1))
    done
    echo "$file"
}

# forward_environment: fills FORWARD with what hands the variables named in FORWARDED to the
# workers.
forward_environment() {
    FORWARD=()
    local name
    for name in "${FORWARDED[@]}"; do
        if [[ -n ${!name:-} ]]; then
            FORWARD+=("+ray_kwargs.ray_init.runtime_env.env_vars.$name=$(quoted "${!name}")")
        fi
    done
}

# launch "$@": the arrays, then what was given on the command line, which wins.
launch() {
    local module=verl.trainer.main_ppo
    case ${DRY_RUN:-0} in
        0) ;;
        1 | strict) module=capo_verl.launch.dry_run ;;
        *) refuse "DRY_RUN=$DRY_RUN: choose one of 1, strict, 0" ;;
    esac
    if [[ ${DRY_RUN:-0} == 0 ]] &&
        { ! mkdir -p "$OUTPUT_DIR" 2>/dev/null || [[ ! -w $OUTPUT_DIR ]]; }; then
        refuse "OUTPUT_DIR=$OUTPUT_DIR cannot be written to: set it to a folder of yours"
    fi
    refuse_interpolation OUTPUT_DIR DATA_DIR MODEL_PATH REWARD_PATH VERL_FILE_LOGGER_PATH \
        PROJECT_NAME EXPERIMENT_NAME
    local metrics=${VERL_FILE_LOGGER_PATH:-$OUTPUT_DIR/metrics.jsonl}
    VERL_FILE_LOGGER_PATH=$(metrics_of_this_attempt "$metrics")
    export VERL_FILE_LOGGER_PATH
    if [[ -n ${RAY_ADDRESS:-} ]]; then
        forward_environment
    else
        FORWARD=("${LOCAL_RAY[@]}")
    fi
    exec "${PYTHON:-python3}" -W ignore -m "$module" \
        "${ALGORITHM[@]}" \
        "${DATA[@]}" \
        "${MODEL[@]}" \
        "${ACTOR[@]}" \
        "${ROLLOUT[@]}" \
        ${REF[@]+"${REF[@]}"} \
        "${REWARD[@]}" \
        "${TRAINER[@]}" \
        "${CHECKPOINTS[@]}" \
        ${SEEDS[@]+"${SEEDS[@]}"} \
        "${EXTRA[@]}" \
        "${FORWARD[@]}" \
        "hydra.run.dir=$(quoted "$OUTPUT_DIR/hydra")" \
        "$@"
}
