#!/bin/sh
# The layer of the program: its files with the same rights whatever the clone's are, their bytecode, and the licences of all in the image.
#   image/program.sh SOURCES
set -eu
cp -R "$1"/. /opt/app
chmod -R u=rwX,go=rX /opt/app
/opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/app
/opt/venv/bin/python "$(dirname "$0")/inventory.py" notice >/opt/app/NOTICE
