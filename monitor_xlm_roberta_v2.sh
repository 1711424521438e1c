#!/usr/bin/env bash
# usage: ./monitor_xlm_roberta_v2.sh [runs/NAME] [--once | --report | --export csv|tensorboard]
#        ./monitor_xlm_roberta_v2.sh --list | --compare RUN RUN ...
#
# Shows the newest run, or the one named, while it trains or after. Installs nothing.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"

python=python3
if [[ -x .venv/bin/python && -f .venv/complete.json ]]; then # without the file it is half-made
  python=.venv/bin/python
fi
if ! "$python" -c 'import sys, tqdm; assert sys.version_info >= (3, 11)' 2>/dev/null; then
  echo "the monitor needs Python 3.11 or newer with tqdm: ./run_xlm_roberta_v2.sh --check makes .venv with both" >&2
  exit 69
fi
exec "$python" monitor.py "$@"
