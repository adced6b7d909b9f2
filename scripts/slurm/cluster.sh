# shellcheck shell=bash disable=SC2154
# SPDX-License-Identifier: Apache-2.0
# Sourced by examples/slurm/train.sbatch: a Ray cluster over the nodes of a Slurm job. Its knobs are
# listed there.

# say MESSAGE: to the job's output, with the time.
say() { echo "[$(date +%H:%M:%S) job ${SLURM_JOB_ID} attempt ${attempt}] $*"; }

# fail WORDS...: ends the job; the EXIT trap stops Ray.
fail() {
    say "ERROR: $*" >&2
    exit 1
}

# refuse WORDS...: the same for what another try would not change.
refuse() {
    say "ERROR: $*" >&2
    exit 2
}

# on_node NODE LOG COMMAND...: a step on one node, inside the container if there is one. Replaces
# the (sub)shell it is called in, so that a signal to that process reaches srun.
# --overlap: the steps share the job's GPUs. Since Slurm 22.05 srun does not inherit the number of
# CPUs from sbatch, and bound to one CPU Ray's workers never register.
on_node() {
    local node=$1 log=$2
    shift 2
    if [[ -n $ray_leash ]]; then exec {ray_leash}>&-; fi
    exec srun --quiet --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
        --cpus-per-task="$cpus_per_node" --export=ALL --output="${log//%/%%}" \
        --error="${log//%/%%}" --open-mode=append "${SRUN_OPTIONS[@]}" "${IN_ENVIRONMENT[@]}" "$@"
}

# choose_environment: fills SRUN_OPTIONS and IN_ENVIRONMENT, which put a command into the venv,
# conda environment or container.
choose_environment() {
    SRUN_OPTIONS=() IN_ENVIRONMENT=()
    if [[ -n ${SETUP:-} ]]; then
        [[ -r $SETUP ]] ||
            refuse "SETUP=$SETUP cannot be read: set it to a file to be sourced, e.g. with your" \
                "'module load' lines"
        set +eu # module systems and conda's hooks rely on that
        # shellcheck disable=SC1090
        source "$SETUP"
        set -eu
    fi
    local chosen=0 variable
    for variable in VENV CONDA_ENV CONTAINER_IMAGE; do
        if [[ -n ${!variable:-} ]]; then chosen=$((chosen + 1)); fi
    done
    ((chosen <= 1)) || refuse "set only one of VENV, CONDA_ENV and CONTAINER_IMAGE"
    if [[ -n ${VENV:-} ]]; then
        [[ -x $VENV/bin/python ]] ||
            refuse "VENV=$VENV has no bin/python: set it to a virtual environment all nodes see"
        export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
    elif [[ -n ${CONDA_ENV:-} ]]; then
        command -v conda >/dev/null ||
            refuse "CONDA_ENV=$CONDA_ENV, but there is no conda: load its module in SETUP"
        IN_ENVIRONMENT=(conda run --no-capture-output -n "$CONDA_ENV")
        if [[ $CONDA_ENV == */* ]]; then IN_ENVIRONMENT[3]=-p; fi
    elif [[ -n ${CONTAINER_IMAGE:-} ]]; then
        for variable in root OUTPUT_DIR RAY_TMP_ROOT; do
            [[ ${!variable} != *[:,]* ]] ||
                refuse "$variable=${!variable}: containers' mounts are separated by , and :, so a" \
                    "folder with one of them cannot be mounted: choose another"
        done
        local mounts="$root,$OUTPUT_DIR,$RAY_TMP_ROOT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
        case ${CONTAINER_RUNTIME:-pyxis} in
            pyxis)
                local mount mounted pyxis_mounts=
                IFS=, read -ra mounted <<<"$mounts"
                for mount in "${mounted[@]}"; do
                    [[ $mount == *:* ]] || mount=$mount:$mount
                    pyxis_mounts+=${pyxis_mounts:+,}$mount
                done
                SRUN_OPTIONS=(--container-image="$CONTAINER_IMAGE"
                    --container-mounts="$pyxis_mounts" --container-workdir="$PWD")
                ;;
            apptainer | singularity)
                command -v "$CONTAINER_RUNTIME" >/dev/null ||
                    refuse "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is not installed"
                IN_ENVIRONMENT=("$CONTAINER_RUNTIME" exec --nv --bind "$mounts" --pwd "$PWD"
                    "$CONTAINER_IMAGE")
                ;;
            *)
                refuse "CONTAINER_RUNTIME=$CONTAINER_RUNTIME: choose pyxis, apptainer or" \
                    "singularity"
                ;;
        esac
    fi
}

# GPUs that Slurm gave this job on each node; the same everywhere, or refused.
detect_gpus() {
    if [[ -n ${NGPUS_PER_NODE:-} ]]; then
        echo "$NGPUS_PER_NODE"
    elif [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif [[ -n ${SLURM_JOB_GPUS:-} ]]; then
        tr ',' '\n' <<<"$SLURM_JOB_GPUS" | grep -c .
    else
        refuse "no GPUs in this job: ask for them (--gres=gpu:8), or set NGPUS_PER_NODE" \
            "(on CPUs: ranks per node)"
    fi
}

# CPUs of this job on each node: of nodes that differ, the fewest. SLURM_JOB_CPUS_PER_NODE is like
# "64(x2),32".
detect_cpus() { tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1; }

# One job at a time may write to OUTPUT_DIR.
claim_output_dir() {
    local file=$OUTPUT_DIR/slurm_job other
    other=$(cat "$file" 2>/dev/null || true)
    if [[ -n $other && $other != "$job" ]] &&
        [[ $(squeue --noheader --jobs="$other" --format=%T 2>/dev/null) == RUNNING ]]; then
        refuse "job $other is running in OUTPUT_DIR=$OUTPUT_DIR: set another one, or wait"
    fi
    echo "$job" >"$file"
}

# Slurm's time limit, as seen from here, has to hold one step at least, or the job would be warned
# and restarted for ever.
check_time_limit() {
    local step_seconds=${STEP_SECONDS:-1800} seconds_left
    seconds_left=$(squeue --noheader --jobs="$job" --format=%L | awk -F'[-:]' '
        /INVALID|UNLIMITED|NOT_SET/ { exit }
        { if ($0 ~ /-/) { days = $1; sub(/^[0-9]*-/, "") } n = split($0, t, ":");
        for (i = 1; i <= n; i++) s = s * 60 + t[i]; print days * 86400 + s }') || seconds_left=""
    if [[ -n $seconds_left ]] && ((seconds_left < step_seconds)); then
        refuse "the time limit leaves $seconds_left s, but one step takes up to" \
            "STEP_SECONDS=$step_seconds: raise --time, or lower STEP_SECONDS"
    fi
}

# Whether Slurm is taking the nodes away: then what ended was not the run's fault.
was_preempted() {
    local time
    time=$(scontrol show job "$job" --oneliner 2>/dev/null |
        sed -n 's/.* PreemptTime=\([^ ]*\).*/\1/p')
    [[ -n $time && $time != None ]]
}

# shellcheck disable=SC2034,SC2317,SC2329 # called by a trap
on_warning() {
    stop_requested=1
    say "warned by Slurm (USR1): the current step is finished, then a checkpoint written"
    touch "$checkpoints/stop"
}

# The IPv4 address under which the other nodes reach the head.
find_head_address() {
    local head=${nodes[0]} address
    if [[ -n ${HEAD_ADDRESS:-} ]]; then
        echo "$HEAD_ADDRESS"
        return
    fi
    if [[ -n ${NIC:-} ]]; then
        address=$(ip -4 -o addr show dev "$NIC" 2>/dev/null |
            sed -n 's/.* inet \([0-9.]*\).*/\1/p' | head -n 1)
        [[ -n $address ]] ||
            refuse "NIC=$NIC has no IPv4 address on $head: 'ip -4 addr' there lists what there is"
        echo "$address"
        return
    fi
    # The address at which Slurm itself reaches the node. A host name may resolve to the loopback on
    # the host itself.
    address=$(scontrol show node "$head" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    address=$(getent ahostsv4 "${address:-$head}" | awk 'NR == 1 { print $1 }')
    if [[ -z $address || $address == 127.* ]] && ((${#nodes[@]} > 1)); then
        local other
        other=$(scontrol show node "${nodes[1]}" --oneliner |
            sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
        other=$(getent ahostsv4 "$other" | awk 'NR == 1 { print $1 }')
        if [[ -n $other && $other != 127.* ]]; then
            address=$(ip -4 -o route get "$other" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
        fi
    fi
    [[ -n $address ]] || refuse "the address of $head is unknown: set HEAD_ADDRESS or NIC"
    echo "$address"
}

# The first of three free ports, below the range that the system takes for clients; where to begin
# follows from the job's id.
find_port() {
    local first=$((20000 + SLURM_JOB_ID * 8 % 12000)) attempts port offset
    for attempts in {0..99}; do
        port=$((20000 + (first - 20000 + attempts * 8) % 12000))
        for offset in 0 1 2; do
            if (exec 3<>"/dev/tcp/127.0.0.1/$((port + offset))") 2>/dev/null ||
                (exec 3<>"/dev/tcp/$head_address/$((port + offset))") 2>/dev/null; then
                continue 2
            fi
        done
        echo "$port"
        return
    done
    fail "no free port between 20000 and 32000 on ${nodes[0]}"
}

# Until the head answers, or for 30 s.
wait_for_head() {
    local i
    for ((i = 0; i < 60; i++)); do
        if (exec 3<>"/dev/tcp/$head_address/$port") 2>/dev/null; then return; fi
        sleep 0.5 & wait $! || true
    done
}

# start_ray: one step per node, in the background; fills ray_steps. They run as long as this shell
# holds the other end of their standard input: a signal would go to all processes of a step at once,
# and Ray could not end in order.
start_ray() {
    local index role
    leash_folder=$(mktemp -d "$RAY_TMP_ROOT/leash.XXXXXX")
    mkfifo -m 600 "$leash_folder/leash"
    exec {ray_leash}<>"$leash_folder/leash"
    for index in "${!nodes[@]}"; do
        role=worker
        if ((index == 0)); then role="head"; fi
        on_node "${nodes[index]}" "$logs/ray-${nodes[index]}.log" \
            bash "$root/scripts/slurm/ray_node.sh" "$role" "${nodes[index]}" "$head_address" \
            "$port" "$gpus_per_node" "$ray_cpus" "$ray_temp.$index" <"$leash_folder/leash" &
        ray_steps[index]=$!
        # The others need somebody to join; later they keep trying by themselves.
        if ((index == 0 && ${#nodes[@]} > 1)); then wait_for_head; fi
    done
}

# Whether all of Ray's steps still run; otherwise says which ended, with the end of its log.
ray_is_whole() {
    local index
    for index in "${!ray_steps[@]}"; do
        if ! kill -0 "${ray_steps[index]}" 2>/dev/null; then
            say "ERROR: Ray on node ${nodes[index]} ended; last lines of" \
                "$logs/ray-${nodes[index]}.log:" >&2
            tail -n 20 "$logs/ray-${nodes[index]}.log" 2>&1 | cut -c1-400 | sed 's/^/    /' >&2
            return 1
        fi
    done
}

# stop_ray: on all nodes, on every way out of the job.
stop_ray() {
    local pids=("${driver_step:-}" "${ray_steps[@]}") pid deadline=$((SECONDS + 45))
    if [[ -n ${driver_step:-} ]]; then kill -TERM "$driver_step" 2>/dev/null || true; fi
    if [[ -n $ray_leash ]]; then exec {ray_leash}>&-; fi
    ray_leash=""
    if [[ -n ${leash_folder:-} ]]; then rm -rf "$leash_folder"; fi
    for pid in "${pids[@]}"; do
        [[ -n $pid ]] || continue
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.5; done
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    driver_step=""
    ray_steps=()
}

# run_step NAME LOG COMMAND...: on the first node, beside Ray; its exit code, or 1 as soon as a part
# of Ray ends.
run_step() {
    local name=$1 log=$2 code=0 i
    shift 2
    on_node "${nodes[0]}" "$log" "$@" </dev/null &
    driver_step=$!
    while kill -0 "$driver_step" 2>/dev/null; do
        if ! ray_is_whole; then
            # What Ray itself reports about its loss belongs into the log.
            for ((i = 0; i < 60; i++)); do
                kill -0 "$driver_step" 2>/dev/null || break
                sleep 1 & wait $! || true
            done
            return 1
        fi
        sleep 1 & wait $! || true
    done
    wait "$driver_step" || code=$?
    driver_step=""
    if ((code != 0)); then
        say "ERROR: $name ended with exit code $code; last lines of $log:" >&2
        tail -n 20 "$log" | cut -c1-400 | sed 's/^/    /' >&2
        # A node that went down takes the training with it, and is noticed a moment later.
        for ((i = 0; i < 10; i++)); do
            ray_is_whole || break
            sleep 1 & wait $! || true
        done
    fi
    return "$code"
}
