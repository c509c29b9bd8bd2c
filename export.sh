#!/usr/bin/env bash
# Write what grand-challenge.org takes for upload: the image, and the weights as a model. Beside each image: its bill of materials
# (CycloneDX: Python's and dpkg's packages, weights) and its licences; in SHA256SUMS the digests of all (`sha256sum -c` checks them).
#   ./export.sh                    both images, and the weights
#   ./export.sh IMAGE:TAG ...      these images, and the weights
# Into dist/, or the folder that DIST names; LEVEL is gzip's (6). An image that the platform would reject is refused before anything is written.
set -euo pipefail
cd "$(dirname "$0")"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
images=("$@")
[ $# -gt 0 ] || images=("${IMAGE:-isles-ensemble}:$version" "${IMAGE:-isles-ensemble}-invoke:$version")
dist=${DIST:-dist}
docker=${DOCKER:-docker}
"$docker" info >/dev/null 2>&1 || { echo "no Docker engine answers: start it, or check your permissions on its socket" >&2; exit 1; }

refuse() {
    echo "refused: $1" >&2
    exit 1
}

look() { "$docker" image inspect -f "$1" "$image"; }

check() {
    local image=$1 user mode command size
    "$docker" image inspect "$image" >/dev/null 2>&1 || { echo "there is no image $image: run ./build.sh first" >&2; exit 1; }
    user=$(look '{{.Config.User}}')
    case "${user%%:*}" in "" | 0 | root) refuse "$image runs as root (USER is '$user'), which the platform rejects" ;; esac
    [ "$(look '{{.Os}}/{{.Architecture}}')" = linux/amd64 ] || refuse "$image is built for $(look '{{.Os}}/{{.Architecture}}'), the platform runs linux/amd64"
    size=$(look '{{.Size}}')
    [ "$size" -le $((10 * 1000 ** 3)) ] || refuse "$image has $size bytes, the platform takes 10 GB"
    mode=$(look '{{with .Config.Labels}}{{index . "org.grand-challenge.api-method"}}{{end}}')
    command=$(look '{{join .Config.Cmd " "}}')
    # the platform goes by the label, the container by its command: when the two differ, it waits for the other until time is up
    case "${mode:-none}/${command:-none}" in
        none/none | exec/none | invoke/serve*) ;;
        *) refuse "$image: label org.grand-challenge.api-method is '$mode', but its command is '$command'" ;;
    esac
}

written=()
save() {
    local image=$1 name tag file count
    name=${image##*/}
    tag=$([[ $name == *:* ]] && echo "${name#*:}" || echo latest)
    name=${name%%:*}
    file=$dist/${name}_$tag.tar.gz
    # saved by its name, so that one name comes with it
    "$docker" save "$image" | gzip "-${LEVEL:-6}" >"$file.partial"
    count=$(tar -xzOf "$file.partial" manifest.json | grep -o '"Config":' | wc -l)
    [ "$count" -eq 1 ] || { rm -f "$file.partial"; refuse "the file of $image holds $count images, the platform takes exactly one"; }
    mv "$file.partial" "$file"
    ls -l "$file"
    describe "$image" sbom "$name" "$tag" "$(look '{{.Id}}')" >"$dist/${name}_$tag.cdx.json"
    describe "$image" notice >"$dist/${name}_$tag.NOTICE.txt"
    written+=("${name}_$tag".{tar.gz,cdx.json,NOTICE.txt})
}

# read from within, so that what was really built is told
describe() {
    local image=$1
    shift
    "$docker" run --rm -i --network none --read-only --cap-drop ALL --entrypoint python "$image" - "$@" <image/inventory.py
}

for image in "${images[@]}"; do check "$image"; done
mkdir -p "$dist"
for image in "${images[@]}"; do save "$image"; done
tar -C model_weights --sort=name --mtime=@315532800 --mode=u=rwX,go=rX --owner=0 --group=0 --numeric-owner -cf - . | gzip -n >"$dist/model.tar.gz.partial"
mv "$dist/model.tar.gz.partial" "$dist/model.tar.gz"
ls -l "$dist/model.tar.gz"
(cd "$dist" && sha256sum "${written[@]}" model.tar.gz >SHA256SUMS)
