#!/usr/bin/env bash
# Run all checks and tests, setting up what is missing. The pages are tested in Chromium (apt-get install chromium); without, those are skipped.
# Arguments go to pytest: ./test.sh test/test_fusion.py -x
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh
need_venv requirements-dev.txt
if [ $# -eq 0 ]; then
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    "$PY" -m mypy
fi
exec "$PY" -m pytest "$@"
