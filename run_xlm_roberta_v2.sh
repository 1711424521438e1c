#!/usr/bin/env bash
# usage: ./run_xlm_roberta_v2.sh [config.yaml] [--check] [--strict] [section.key=value ...]
#
# Prepares the environment, checks everything, then trains on all visible GPUs, or on the CPU.
# The same command again goes on where a stopped run was. --check trains nothing.
#
# NPROC=2 sets the number of processes. On several machines, run it on each with NNODES=4,
# NODE_RANK=0 to 3 and RDZV_ENDPOINT=first-machine:29400. The exit codes are those of errors.py.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"

if ! command -v python3 >/dev/null; then
  echo "Python 3.11 or newer is needed, but there is no python3 on PATH: install it" \
    "(apt install python3 python3-venv, brew install python, or python.org)" >&2
  exit 69
fi
python="$(python3 environment.py)"
exec "$python" launch.py "$@"
