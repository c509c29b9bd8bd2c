#!/usr/bin/env bash
# Build the container images: NAME for one case a run (exec), NAME-invoke for grand-challenge's HTTP mode. They share all layers.
# Arguments go to `docker build`.
#   ./build.sh                                   GPU images on the base image named in the Dockerfile
#   BASE_IMAGE=debian-python:12 ./build.sh       on another base image (one with python3 and its venv module)
# IMAGE names them (isles-ensemble), DOCKER the client (docker), BUILD_NETWORK the network of the build. Wheels laid into wheels/ are
# preferred to the package index. CA_BUNDLE names a certificate bundle that pip needs on the way to the index; it is in no layer.
set -euo pipefail
cd "$(dirname "$0")"
IMAGE=${IMAGE:-isles-ensemble}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
docker=${DOCKER:-docker}
command -v "$docker" >/dev/null || { echo "no docker client: install Docker Engine, or set DOCKER" >&2; exit 1; }
"$docker" info >/dev/null 2>&1 || { echo "no Docker engine answers: start it, or check your permissions on its socket" >&2; exit 1; }
arguments=(--platform linux/amd64)
[ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[ -z "${BUILD_NETWORK:-}" ] || arguments+=(--network "$BUILD_NETWORK")
[ -z "${CA_BUNDLE:-}" ] || arguments+=(--secret "id=ca,src=$CA_BUNDLE")
export DOCKER_BUILDKIT=1
"$docker" build "${arguments[@]}" --target exec --build-arg "TAG=$IMAGE:$version" -t "$IMAGE:$version" -t "$IMAGE:latest" "$@" .
"$docker" build "${arguments[@]}" --target invoke -t "$IMAGE-invoke:$version" -t "$IMAGE-invoke:latest" "$@" .
for image in "$IMAGE" "$IMAGE-invoke"; do
    "$docker" images --format '{{.Repository}}:{{.Tag}} {{.Size}}' "$image:$version"
done
