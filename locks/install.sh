#!/usr/bin/env bash
# Install what a lock holds: every package by version and SHA-256, then torch by version with what its wheel brings beside.
#   locks/install.sh PYTHON LOCK [OPTION ...]     LOCK: run, dev, tools; options go to `pip install`
# torch alone has no hash: which wheel serves depends on the machine (CPU, CUDA, or the base image's own). What it shares with others is
# locked, and installed before it, so that its wheel brings no more than the CUDA libraries that it names by version.
set -euo pipefail
python=$1 lock=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
install() { "$python" -m pip install --disable-pip-version-check --no-input "$@"; }
locked() { install --require-hashes --no-deps "$@"; }

# a source package would fetch what builds it without hashes: its builder is locked as well, and used as it is
locked --only-binary :all: "$@" -r "$here/build.txt"
locked --no-build-isolation "$@" -r "$here/$lock.txt"
[ "$lock" = tools ] || install "$@" "$(grep -o '^torch==[0-9.]*' "$here/../requirements.txt")"
