#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the tests need into a virtual environment, then lints, checks types and runs the tests.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh tests/core -k golden   # arguments for pytest; no lint, no types
#
# TEST_JOBS            processes for the tests that may run side by side (default 2)
# CAPO_VENV, PYTHON, TORCH_INDEX_URL see scripts/environment.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment '.[cpu,data,smollm2,study,test,viewer]' scripts/smollm2.requirements.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="${PYTHONPATH:-}"
if [ $# -gt 0 ]; then exec "$VENV/bin/python" -m pytest "$@"; fi

echo "== ruff";  "$VENV/bin/ruff" check . && "$VENV/bin/ruff" format --check .
echo "== mypy";  "$VENV/bin/mypy"
echo "== bash";  git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 -n1 bash -n
git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 "$VENV/bin/shellcheck" -x
failed=0
echo "== pytest: what may run side by side"
"$VENV/bin/python" -m pytest -q -n "${TEST_JOBS:-2}" --dist loadfile --durations=15 -m "not alone" || failed=1
echo "== pytest: what runs alone"
"$VENV/bin/python" -m pytest -v --durations=15 -m alone || failed=1
exit $failed
