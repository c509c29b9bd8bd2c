#!/usr/bin/env bash
# Run a command with a container engine of its own, on a Debian machine that has none; take everything away afterwards.
#   test/container/engine.sh ./test.sh --container
# Needs root, apt and 12 GB below $TMPDIR (/tmp). Installs Debian's docker.io and debootstrap if they are missing, starts an engine on a
# private socket with private stores (the host's firewall, forwarding and other engines stay untouched), makes a base image of the Debian
# that runs here, and sets for the command: DOCKER, DOCKER_HOST, DOCKER_CONFIG, BASE_IMAGE, BUILD_NETWORK, CA_BUNDLE.
# ENGINE_CACHE names a folder that keeps the base image between calls.
set -Eeuo pipefail
[ $# -gt 0 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "NO CONTAINER ENGINE: root is needed to start one" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/engine.XXXXXX")
chmod 755 "$work"
export DOCKER=/usr/bin/docker # Debian's client has BuildKit built in; one from elsewhere may come first in PATH and want a plugin
export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/config
export BASE_IMAGE=local/debian-python BUILD_NETWORK=host

# control groups that engines make
cgroups() { find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d -name docker 2>/dev/null; }
cgroups_before=$(cgroups)

fail() {
    echo "NO CONTAINER ENGINE: $1" >&2
    [ ! -s "$work/${2:-}" ] || [ -d "$work/${2:-}" ] || tail -n 25 "$work/${2:-}" >&2
    exit 1
}

tear_down() {
    local code=$? pid containers
    trap - EXIT
    set +e
    if [ -s "$work/docker.pid" ]; then
        pid=$(cat "$work/docker.pid")
        containers=$("$DOCKER" ps -aq 2>/dev/null)
        [ -z "$containers" ] || "$DOCKER" rm -f $containers >/dev/null 2>&1
        kill "$pid" 2>/dev/null # it ends the containerd that it started
        for _ in $(seq 60); do
            case "$(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null)" in '' | Z) break ;; esac
            sleep 0.5
        done
    fi
    awk -v below="$work/" 'index($5, below) == 1 {print $5}' /proc/self/mountinfo | sort -r | while read -r mount; do umount "$mount"; done
    cgroups | grep -vxF "$cgroups_before" | while read -r group; do
        find "$group" -depth -type d | while read -r inner; do rmdir "$inner" 2>/dev/null; done
    done
    if grep -q " $work/" /proc/self/mountinfo; then
        echo "still mounted, left in place: $work" >&2
    else
        rm -rf --one-file-system "$work"
    fi
    exit "$code"
}
trap tear_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! { [ -x "$DOCKER" ] && command -v dockerd iptables debootstrap; } >/dev/null 2>&1; then
    echo "installing docker.io and debootstrap"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io iptables debootstrap ca-certificates; } \
        >"$work/apt.log" 2>&1 || fail "apt-get could not install docker.io and debootstrap" apt.log
fi
export PATH=$PATH:/usr/sbin:/sbin
if [ -z "${CA_BUNDLE:-}" ] && [ -s /etc/ssl/certs/ca-certificates.crt ]; then export CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt; fi

mkdir -p "$work"/{data,exec,config}
setsid nohup dockerd --host "$DOCKER_HOST" --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/docker.pid" \
    --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false >"$work/dockerd.log" 2>&1 </dev/null &
for _ in $(seq 120); do
    "$DOCKER" info >/dev/null 2>&1 && break
    sleep 0.5
done
"$DOCKER" info --format 'engine {{.ServerVersion}}, storage {{.Driver}}, cgroup v{{.CgroupVersion}}' 2>"$work/info.log" ||
    fail "dockerd did not start" dockerd.log

# a base image without a registry
base=${ENGINE_CACHE:-$work}/debian-python.tar
if [ ! -s "$base" ]; then
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v release="$release" '$2 == release {print $1; exit}')
    [ -n "$mirror" ] || fail "apt knows no source of Debian $release to make the base image from"
    echo "making the base image: Debian $release with Python, from $mirror"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$release" "$work/root" "$mirror" \
        >"$work/debootstrap.log" 2>&1 || fail "debootstrap could not make a base image" debootstrap.log
    : >"$work/root/etc/hosts" # where there is none, builders leave the date of one in a layer
    find "$work/root/usr/share/doc" -type f ! -name copyright -delete
    tar -C "$work/root" --numeric-owner --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' \
        --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' -cf "$base.partial" .
    mv "$base.partial" "$base"
    rm -rf --one-file-system "$work/root"
fi
"$DOCKER" import -c 'CMD ["/bin/bash"]' "$base" "$BASE_IMAGE" >/dev/null || fail "the base image could not be imported" dockerd.log
[ -n "${ENGINE_CACHE:-}" ] || rm -f "$base"

"$@"
