#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the tests need into a virtual environment, then lints, checks types and runs the tests.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh tests/core -k golden   # arguments for pytest; no lint, no types
#
# TEST_JOBS            processes for the tests that may run side by side (default 2)
# CAPO_VENV, PYTHON, TORCH_INDEX_URL see scripts/environment.sh.

# shellcheck disable=SC2317,SC2329  # some functions are called by name only: by phase, by the trap
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment '.[cpu,data,docs,smollm2,study,test,trl,viewer]' scripts/smollm2.requirements.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="${PYTHONPATH:-}"
if [ $# -gt 0 ]; then exec "$VENV/bin/python" -m pytest "$@"; fi

reports=$(mktemp -d)
finish() { "$VENV/bin/python" -m tests.summary "$reports" || true; rm -rf "$reports"; }
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
    phase "pytest: $1" "$VENV/bin/python" -m pytest --durations=15 --junitxml="$reports/pytest: $1.xml" "${@:2}" || failed=1
}

phase ruff style
phase mypy "$VENV/bin/mypy"
phase bash shell
failed=0
tests "what may run side by side" -q -n "${TEST_JOBS:-2}" -m "not alone and not ray"
tests "what starts Ray" -v -n "${TEST_JOBS:-2}" -m ray
tests "what runs alone" -q -m alone
exit $failed
