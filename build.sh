#!/usr/bin/env bash
# Build the container image. Arguments go to `docker build`.
#   ./build.sh                                   GPU image on the base image named in the Dockerfile
#   BASE_IMAGE=debian-python:12 ./build.sh       on another base image (one with python3 and its venv module)
# Wheels laid into wheels/ are preferred to the package index. CA_BUNDLE names a certificate bundle that pip needs on the way
# to the index; it is in no layer.
set -euo pipefail
cd "$(dirname "$0")"
IMAGE=${IMAGE:-isles-ensemble}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
docker=${DOCKER:-docker}
command -v "$docker" >/dev/null || { echo "no docker client: install Docker Engine, or set DOCKER" >&2; exit 1; }
"$docker" info >/dev/null 2>&1 || { echo "no Docker engine answers: start it, or check your permissions on its socket" >&2; exit 1; }
arguments=(--platform linux/amd64 --target exec -t "$IMAGE:$version" -t "$IMAGE:latest")
[ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[ -z "${CA_BUNDLE:-}" ] || arguments+=(--secret "id=ca,src=$CA_BUNDLE")
DOCKER_BUILDKIT=1 "$docker" build "${arguments[@]}" "$@" .
"$docker" images --format '{{.Repository}}:{{.Tag}} {{.Size}}' "$IMAGE"
