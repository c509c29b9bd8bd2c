#!/usr/bin/env bash
# Renew locks/: versions and SHA-256 of all files of every package that the requirements files name and bring, for Python 3.11 to 3.13.
# To be run after each change of requirements.txt, requirements-dev.txt or a file locks/*.in.
#   ./renew.sh                 keep the locked versions; add what is new, leave out what nothing brings any more
#   ./renew.sh --upgrade       the newest versions of all that the requirements files don't pin
#   ./renew.sh -P NAME         the newest version of one package
# Arguments go to `uv pip compile`. The index is uv's (UV_DEFAULT_INDEX names another).
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh
need_tools

# everything is resolved together, so that tests run with what is shipped; the smaller locks are cut from it
compile() { "$TOOLS/uv" --quiet pip compile --config-file locks/uv.toml --universal --python-version 3.11 --generate-hashes --no-header "$@"; }
compile --annotation-style line --no-emit-package torch requirements-dev.txt -o locks/dev.txt "$@"
compile --annotation-style line --no-emit-package torch requirements.txt -c locks/dev.txt -o locks/run.txt --upgrade
compile --annotation-style line locks/build.in -c locks/dev.txt -o locks/build.txt --upgrade
compile --annotation-style line locks/tools.in -o locks/tools.txt "$@"
git --no-pager diff --stat -- locks 2>/dev/null || true
