#!/bin/sh
# Run a command that makes a layer of the image, then give all that it changed one date, so that the same content makes the same layer.
#   image/layer.sh COMMAND ...     SOURCE_DATE_EPOCH is the date
set -eu
: "${SOURCE_DATE_EPOCH:?}"
export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1
begin=/dev/shm/begin # no layer holds what lies there
: >"$begin"
sleep 0.1 # the clock of file systems is coarse
umask 022
"$@"
find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /mnt -o -path /media -o -path /etc/hosts -o -path /etc/resolv.conf \) -prune \
    -o -cnewer "$begin" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
