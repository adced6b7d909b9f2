#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the tests need into a virtual environment, then lints, checks types and runs the tests.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh tests/core -k golden   # arguments for pytest; no lint, no types
#
# CAPO_VENV, PYTHON, TORCH_INDEX_URL see scripts/environment.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment '.[cpu,data,smollm2,test]' scripts/smollm2.requirements.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="${PYTHONPATH:-}"
if [ $# -eq 0 ]; then
    echo "== ruff";  "$VENV/bin/ruff" check . && "$VENV/bin/ruff" format --check .
    echo "== mypy";  "$VENV/bin/mypy"
    echo "== bash";  git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 -n1 bash -n
    git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 "$VENV/bin/shellcheck" -x
    echo "== pytest"
fi
exec "$VENV/bin/python" -m pytest --durations=10 "$@"
