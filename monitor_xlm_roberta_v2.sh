#!/usr/bin/env bash
# usage: ./monitor_xlm_roberta_v2.sh [runs/NAME] [--once]
#
# Shows the newest run, or the one named, while it trains or after. Installs nothing.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"

python=python3
if [[ -x .venv/bin/python && -f .venv/complete.json ]]; then # without the file it is half-made
  python=.venv/bin/python
fi
exec "$python" monitor.py "$@"
