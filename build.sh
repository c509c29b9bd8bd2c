#!/usr/bin/env bash
# Build the container images: NAME for one case a run (exec), NAME-invoke for grand-challenge's HTTP mode. They share all layers.
# Arguments go to `docker build`.
#   ./build.sh                                   GPU images on the base image named in the Dockerfile
#   BASE_IMAGE=debian-python:12 ./build.sh       on another base image (one with python3 and its venv module); name@sha256:... pins it
# IMAGE names them (isles-ensemble), DOCKER the client (docker), BUILD_NETWORK the network of the build. Wheels laid into wheels/ are
# preferred to the package index. CA_BUNDLE names a certificate bundle that pip needs on the way to the index; it is in no layer.
# SOURCE_DATE_EPOCH is the date of every file in our layers (1980-01-01): on one base image, one commit gives the same layers.
set -euo pipefail
cd "$(dirname "$0")"
IMAGE=${IMAGE:-isles-ensemble}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
licence=$(sed -n 's/^license = "\(.*\)"/\1/p' pyproject.toml)
docker=${DOCKER:-docker}
base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}
command -v "$docker" >/dev/null || { echo "no docker client: install Docker Engine, or set DOCKER" >&2; exit 1; }
"$docker" info >/dev/null 2>&1 || { echo "no Docker engine answers: start it, or check your permissions on its socket" >&2; exit 1; }

# what the images are made from: the base image by digest, or by its ID where it never was in a registry
"$docker" image inspect "$base" >/dev/null 2>&1 || "$docker" pull --platform linux/amd64 "$base"
digest=${base##*@}
if [[ $base != *@* ]]; then
    digest=$("$docker" image inspect -f '{{range .RepoDigests}}{{println .}}{{end}}' "$base" | sed -n 's/.*@//p' | head -n 1)
    digest=${digest:-$("$docker" image inspect -f '{{.Id}}' "$base")}
fi
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || revision+=-modified

arguments=(--platform linux/amd64 --build-arg "BASE_IMAGE=$base")
[ -z "${SOURCE_DATE_EPOCH:-}" ] || arguments+=(--build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH")
[ -z "${BUILD_NETWORK:-}" ] || arguments+=(--network "$BUILD_NETWORK")
[ -z "${CA_BUNDLE:-}" ] || arguments+=(--secret "id=ca,src=$CA_BUNDLE")
labels=("title=$IMAGE" "version=$version" "revision=$revision" "licenses=$licence" "base.name=${base%@*}" "base.digest=$digest")
for label in "${labels[@]}"; do arguments+=(--label "org.opencontainers.image.$label"); done
export DOCKER_BUILDKIT=1
"$docker" build "${arguments[@]}" --target exec --build-arg "TAG=$IMAGE:$version" -t "$IMAGE:$version" -t "$IMAGE:latest" "$@" .
"$docker" build "${arguments[@]}" --target invoke -t "$IMAGE-invoke:$version" -t "$IMAGE-invoke:latest" "$@" .
for image in "$IMAGE" "$IMAGE-invoke"; do
    "$docker" images --format '{{.Repository}}:{{.Tag}} {{.Size}}' "$image:$version"
done
echo "its layers, from the base image's up:"
"$docker" history --no-trunc --format '| {{.Size}} | {{.CreatedBy}} |' "$IMAGE:$version" | tac |
    sed -n '/^| 0B /d; s#| RUN .*/packages\.sh .*#| Python packages |#
        s#| RUN .*/program\.sh .*#| program and weights |#; s#^\(| [^|]* |\) *|$#\1 base image |#; s#^\(.\{100\}\).*#\1...#; p'
