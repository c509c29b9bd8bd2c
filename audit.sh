#!/usr/bin/env bash
# Ask a source of advisories about each package of locks/run.txt and torch: exit code 1 where one has a known vulnerability.
#   ./audit.sh                       the advisories that the package index gives
#   ./audit.sh --vulnerability-service osv
#   ./audit.sh --format cyclonedx-json -o audit.json
# So does a package that the source doesn't know: no answer is not a good one. Arguments go to pip-audit; nothing of ours is installed or run.
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh
need_tools
asked=$(mktemp)
trap 'rm -f "$asked"' EXIT
{ grep -o '^torch==[0-9.]*' requirements.txt; grep -oE '^[a-zA-Z0-9._-]+==[^ ]+( ; [^\\]+)?' locks/run.txt; } >"$asked"
"$TOOLS/pip-audit" --strict --no-deps --disable-pip -r "$asked" "$@"
