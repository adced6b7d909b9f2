#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks a run, then submits it to Slurm:
#
#   bash scripts/slurm/submit.sh --nodes=2 --gres=gpu:8 --cpus-per-task=64 --time=24:00:00 -- \
#       examples/run_qwen2_5_math_7b_megatron.sh +capo=grpo
#   bash scripts/slurm/submit.sh --array=1-5 ... -- SCRIPT    # five seeds
#   bash scripts/slurm/submit.sh --chain=4 ... -- SCRIPT    # up to four jobs, each goes on
#
# Before "--": options for sbatch (all go there as they are, but --chain and --no-check). After it:
# a run script and its arguments. What is checked: the run's configuration and memory plan for that
# many nodes and GPUs, in VENV or CONDA_ENV if set (--no-check leaves this out, e.g. where verl is
# not installed on the login node; with CONTAINER_IMAGE only the job checks), and that the time
# limit holds a step: STEP_SECONDS (default 1800) is how long a training step with its checkpoint
# may take, and how long before the end the job is warned. Further variables: train.sbatch.

set -euo pipefail

refuse() {
    echo "submit.sh: $*" >&2
    exit 2
}

# seconds TIME: Slurm's formats MINUTES, MIN:SEC, H:M:S, D-H, D-H:M, D-H:M:S (man sbatch, --time).
seconds() {
    [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
        refuse "--time=$1: write it as minutes, H:MM:SS or D-HH:MM:SS"
    local days=0 rest=$1 fields
    if [[ $rest == *-* ]]; then
        days=${rest%%-*}
        rest=${rest#*-}
    fi
    IFS=: read -ra fields <<<"$rest"
    local -i a=10#${fields[0]} b=10#${fields[1]:-0} c=10#${fields[2]:-0}
    if [[ $1 == *-* ]]; then
        echo $((10#$days * 86400 + a * 3600 + b * 60 + c))
    elif ((${#fields[@]} == 3)); then
        echo $((a * 3600 + b * 60 + c))
    else
        echo $((a * 60 + b))
    fi
}

# gpus_of GRES: how many GPUs of any type, e.g. 8 of gpu:h100:8,nvme:100; nothing if there are none.
gpus_of() {
    local entry
    for entry in ${1//,/ }; do
        if [[ $entry =~ ^gpu(:[^:]*[^:0-9][^:]*)?(:([0-9]+))?$ ]]; then
            echo "${BASH_REMATCH[3]:-1}"
        fi
    done
}

# in_environment COMMAND...: as the job will run it. In a subshell.
in_environment() {
    if [[ -n ${SETUP:-} ]]; then
        set +eu
        # shellcheck disable=SC1090
        source "$SETUP"
        set -eu
    fi
    if [[ -n ${VENV:-} ]]; then
        PATH=$VENV/bin:$PATH "$@"
    elif [[ ${CONDA_ENV:-} == */* ]]; then
        conda run --no-capture-output -p "$CONDA_ENV" "$@"
    elif [[ -n ${CONDA_ENV:-} ]]; then
        conda run --no-capture-output -n "$CONDA_ENV" "$@"
    else
        "$@"
    fi
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

chain=1 check=1 array=0 limit="" nodes=1 gpus="" options=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --chain=*) chain=${1#*=} ;;
        --no-check) check=0 ;;
        --signal* | --open-mode*)
            refuse "${1%%=*} is set here: STEP_SECONDS says how long before the end the job is" \
                "warned"
            ;;
        *)
            options+=("$1")
            case $1 in
                --time=*) limit=${1#*=} ;;
                -t | --time) limit=${2:-} ;;
                -t?*) limit=${1#-t} ;;
                --nodes=*) nodes=${1#*=} ;;
                -N | --nodes) nodes=${2:-} ;;
                -N?*) nodes=${1#-N} ;;
                --gres=*) gpus=$(gpus_of "${1#*=}") ;;
                --gres) gpus=$(gpus_of "${2:-}") ;;
                --gpus-per-node=*) gpus=$(gpus_of "gpu:${1#*=}") ;;
                --gpus-per-node) gpus=$(gpus_of "gpu:${2:-}") ;;
                --array*) array=1 ;;
                -a*) array=1 ;;
            esac
            ;;
    esac
    shift
done
(($# >= 2)) ||
    refuse "which run script? submit.sh [sbatch options] -- examples/run_NAME.sh [key=value ...]"
shift
script=$1
[[ -f $script ]] ||
    refuse "there is no run script $script (paths are relative to the repository's root)"
[[ $chain =~ ^[1-9][0-9]*$ ]] || refuse "--chain=$chain: set it to the number of jobs"
if ((chain > 1 && array)); then
    refuse "--chain and --array together: submit a chain for each seed, with SEED set"
fi
export STEP_SECONDS=${STEP_SECONDS:-1800}
# Slurm keeps the time of the warning in 16 bits (man sbatch, --signal).
if ! [[ $STEP_SECONDS =~ ^[1-9][0-9]{0,4}$ ]] || ((STEP_SECONDS > 65535)); then
    refuse "STEP_SECONDS=$STEP_SECONDS: set it to 1..65535 seconds"
fi

if [[ -n $limit && ${limit^^} != UNLIMITED && ${limit^^} != INFINITE ]]; then
    join=${JOIN_SECONDS:-300}
    limit_seconds=$(seconds "$limit") || exit 2
    if ((limit_seconds < STEP_SECONDS + join)); then
        refuse "--time=$limit is $limit_seconds s, less than one step" \
            "(STEP_SECONDS=$STEP_SECONDS) and starting up (JOIN_SECONDS=$join): raise it"
    fi
elif [[ -z $limit ]]; then
    echo "submit.sh: no --time given: the job checks the partition's limit when it starts" >&2
fi

name=$(basename "${script%.sh}")
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/${name#run_}-$(date +%Y%m%d-%H%M%S)}
[[ $OUTPUT_DIR == /* ]] || OUTPUT_DIR=$PWD/$OUTPUT_DIR
progress=$OUTPUT_DIR/checkpoints/progress.json
if [[ -f $progress ]]; then
    measured=$(sed -n 's/.*"step_seconds": *\([0-9]*\).*/\1/p' "$progress")
    if ((${measured:-0} > STEP_SECONDS)); then
        refuse "a step of this run took $measured s (in $progress): set STEP_SECONDS to more than" \
            "that"
    fi
fi

if ((check)) && [[ -n ${CONTAINER_IMAGE:-} ]]; then
    echo "submit.sh: the configuration is checked in the container, when the job starts" >&2
elif ((check)); then
    # The first number of a range such as 2-4: what the job gets at least.
    if ! plan=$(in_environment env DRY_RUN=1 NNODES="${nodes%%-*}" \
        ${gpus:+NGPUS_PER_NODE="$gpus"} bash "$@" 2>&1); then
        refuse "the run would be refused: $(tail -n 1 <<<"$plan")"
    fi
    sed -n '/^# Plan/,$p' <<<"$plan"
fi
mkdir -p "$OUTPUT_DIR" ||
    refuse "OUTPUT_DIR=$OUTPUT_DIR cannot be written to: set it to a folder of yours"
rm -f "$OUTPUT_DIR/attempts.jsonl.gave_up"

dependency=()
for ((link = 1; link <= chain; link++)); do
    # In a chain the next job resumes, so a job that has to stop ends, with an exit code other than
    # 0.
    if ((chain > 1)); then export REQUEUE=0; fi
    job=$(CAPO_VERL_ROOT=$PWD CHAIN_LINK=$link sbatch --parsable --job-name="${name#run_}" \
        "--signal=B:USR1@$STEP_SECONDS" "${options[@]}" ${dependency[@]+"${dependency[@]}"} \
        examples/slurm/train.sbatch "$@")
    job=${job%%;*}
    echo "job $job: $script -> $OUTPUT_DIR"
    dependency=("--dependency=afternotok:$job" --kill-on-invalid-dep=yes)
done
