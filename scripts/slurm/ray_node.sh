#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One node's part of a Ray cluster: started by examples/slurm/train.sbatch as a job step, it runs
# until its standard input is closed, it is cancelled, or Ray ends, and leaves neither a process nor
# a temporary file behind.
#
#   ray_node.sh head|worker NODE_NAME HEAD_ADDRESS PORT GPUS CPUS TEMP_DIR
#
# Ray's auth mode and token come from the environment, as do all variables which the run's workers
# should have.

set -uo pipefail
role=$1 name=$2 head=$3 port=$4 gpus=$5 cpus=$6 temp=$7

# The interface on which this node reaches the head. Gloo would take the one its host name resolves
# to, which on some systems is the loopback. A variable which is set wins.
interface() {
    command -v ip >/dev/null || return 0
    ip -4 -o route get "$head" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p'
}
nic=${NIC:-$(interface)}
# "local" addresses are routed over lo; the peers are elsewhere.
if [[ $nic == lo && $role == head && $NODES -gt 1 && $head != 127.* ]]; then
    nic=$(ip -4 -o addr show | sed -n "s|^[0-9]*: *\([^ ]*\) *inet $head/.*|\1|p")
fi
if [[ -n $nic ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$nic}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$nic}
fi
echo "$name: Ray $role, $gpus GPUs, $cpus CPUs, GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-}" \
    "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-}"

# Random ports everywhere but on the head, whose address the others must know: two jobs may share a
# node.
options=(--node-name="$name" --num-cpus="$cpus" --temp-dir="$temp"
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats)
# Ray counts the GPUs it finds, and the health gate compares: a number given here would be believed.
# On CPUs there is one "GPU" for each rank.
if [[ ${VERL_PLATFORM:-} == cpu ]]; then options+=(--num-gpus="$gpus"); fi
if [[ $role == head ]]; then
    options+=(--head --node-ip-address="$head" --port="$port" --ray-client-server-port=$((port + 1))
        --include-dashboard="${RAY_DASHBOARD:-false}" --dashboard-port=$((port + 2)))
else
    options+=(--address="$head:$port")
fi

# Slurm sets AMD's variables with every kind of GPU, and verl refuses them beside CUDA's
# (verl/single_controller/base/worker.py).
if [[ ! -e /dev/kfd ]]; then unset ROCR_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ZE_AFFINITY_MASK; fi

# The name can be guessed: a folder that is there already is not ours.
if ! mkdir -m 700 "$temp"; then
    echo "$name: the temporary folder $temp cannot be made: set RAY_TMP_ROOT to another one" >&2
    exit 1
fi
# Ray's workers inherit the variable: a helper process that a killed rank leaves behind is found by
# it.
CAPO_VERL_RAY_NODE=$temp ray start --block "${options[@]}" &
ray=$!
# Ends when the job closes its end. Whatever outlives this script must not hold the step's output,
# or srun would wait for it.
cat <&0 >/dev/null 2>&1 &
leash=$!
# Slurm signals all processes of a step. Ray would wait 30 s for its own head, as long as Slurm does
# before it kills the rest.
# shellcheck disable=SC2317,SC2329 # called by the trap
on_cancel() {
    trap '' TERM INT
    sleep 5
    kill -KILL "$ray" 2>/dev/null
}
trap on_cancel TERM INT
asked=0
while kill -0 "$ray" 2>/dev/null; do
    if ((asked == 0)) && ! kill -0 "$leash" 2>/dev/null; then
        asked=1
        kill -TERM "$ray" 2>/dev/null
    fi
    wait -n "$ray" "$leash" 2>/dev/null
done
wait "$ray"
code=$?
kill "$leash" 2>/dev/null
# Ray's own exit code, 1 after a signal, is no error when it was asked to end.
if ((asked)); then code=0; fi

for environment in /proc/[0-9]*/environ; do
    if grep -qzsxF "CAPO_VERL_RAY_NODE=$temp" "$environment"; then
        pid=${environment#/proc/}
        kill -KILL "${pid%/environ}" 2>/dev/null
    fi
done
rm -rf "$temp"
echo "$name: Ray ended with exit code $code"
exit "$code"
