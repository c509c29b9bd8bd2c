#!/usr/bin/env bash
# Write what grand-challenge.org takes for upload into dist/: the image, and the weights as a model.
#   ./export.sh [IMAGE:TAG]
set -euo pipefail
cd "$(dirname "$0")"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
image=${1:-${IMAGE:-isles-ensemble}:$version}
docker=${DOCKER:-docker}
"$docker" image inspect "$image" >/dev/null 2>&1 || { echo "there is no image $image: run ./build.sh first" >&2; exit 1; }

look() { "$docker" image inspect -f "$1" "$image"; }
user=$(look '{{.Config.User}}')
case "${user%%:*}" in "" | 0 | root) echo "refused: $image runs as root (USER is '$user'), which the platform rejects" >&2; exit 1 ;; esac
[ "$(look '{{.Architecture}}')" = amd64 ] || { echo "refused: $image is not built for amd64" >&2; exit 1; }
[ "$(look '{{.Size}}')" -le $((10 * 1000 ** 3)) ] || { echo "refused: $image is larger than the platform's 10 GB" >&2; exit 1; }

mkdir -p dist
name=$(basename "${image%%:*}")_$version
"$docker" save "$image" | gzip -6 >"dist/$name.tar.gz.partial"
mv "dist/$name.tar.gz.partial" "dist/$name.tar.gz"
tar -C model_weights -czf dist/model.tar.gz.partial .
mv dist/model.tar.gz.partial dist/model.tar.gz
ls -l "dist/$name.tar.gz" dist/model.tar.gz
