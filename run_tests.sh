#!/usr/bin/env bash
# usage: ./run_tests.sh [--deep] [pytest arguments]
#
# Prepares the environment with the test tools, checks style and scripts, and runs the tests;
# with --deep also those that take minutes.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"

chosen="not deep"
if [[ "${1:-}" == --deep ]]; then
  chosen="deep or not deep"
  shift
fi
if ! command -v python3 >/dev/null; then
  echo "Python 3.11 or newer is needed, but there is no python3 on PATH" >&2
  exit 69
fi
python="$(python3 environment.py --tests)"
PATH="$(dirname -- "$python"):$PATH" # for shellcheck, which has no module to run
"$python" -m ruff check .
"$python" -m ruff format --check .
shellcheck ./*.sh .ci/run
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}" # as hardware.share_cores has it
exec "$python" -m pytest -m "$chosen" "$@"
