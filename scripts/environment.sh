# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: makes the virtual environment and installs the project into it,
# once.
#
# CAPO_VENV           virtual environment, made if missing (default .venv; CAPO_VENV=$VIRTUAL_ENV
#                     takes the active one)
# CAPO_SKIP_INSTALL   1: install nothing into it
# PYTHON              interpreter to make it with (default: the first of python3, python3.12, 3.11,
#                     3.10 that fits)
# TORCH_INDEX_URL     where torch's CPU build comes from; empty: only pip's own indexes

VENV=${CAPO_VENV:-.venv}
TORCH_INDEX_URL=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; }
reachable() {
    "$VENV/bin/python" -c '
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/", timeout=10)' "$1" 2>/dev/null
}
# The environment is up to date if it was installed from these files into this place, with these
# extras.
stamp() { { cat pyproject.toml "${@:2}"; pwd; echo "$1"; } | cksum; }

make_venv() {
    if [ ! -x "$VENV/bin/python" ]; then
        local python
        for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
            if fits "$python"; then break; fi
            python=
        done
        if [ -z "${python:-}" ]; then
            echo "No Python 3.10, 3.11 or 3.12 found: install one, or set PYTHON to its path." >&2
            exit 2
        fi
        echo "Making the virtual environment $VENV ($("$python" --version))"
        if ! "$python" -m venv "$VENV"; then
            rm -rf "$VENV"
            echo "$python cannot make virtual environments: install its venv module" \
                "(Debian, Ubuntu: python3-venv)." >&2
            exit 2
        fi
    fi
}

# make_environment '.[cpu]' [FILE...]: afterwards "$VENV/bin/python" runs the project with those
# extras, and with the packages of the requirements files, which are installed without their
# dependencies. Call it in the repository's root.
make_environment() {
    make_venv
    local file installed="$VENV/.capo-verl" # with a name for what is installed
    for file in "$@"; do
        file=${file##*/}
        installed+=-${file//[^[:lower:]]/}
    done
    if [ "${CAPO_SKIP_INSTALL:-0}" != 1 ] &&
        [ "$(cat "$installed" 2>/dev/null)" != "$(stamp "$@")" ]; then
        echo "Installing $1 into $VENV (about 2 GB, once)"
        local index=()
        if [ -n "$TORCH_INDEX_URL" ] && reachable "$TORCH_INDEX_URL"; then
            index=(--extra-index-url "$TORCH_INDEX_URL")
        fi
        # torch is named in the same command, so that no dependency can pull the CUDA build first.
        local torch; torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
        "$VENV/bin/python" -m pip install --quiet ${index[@]+"${index[@]}"} "$torch" -e "$1"
        for file in "${@:2}"; do
            "$VENV/bin/python" -m pip install --quiet --no-deps -r "$file"
        done
        stamp "$@" >"$installed"
    fi
}
