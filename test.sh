#!/usr/bin/env bash
# Run all checks and tests, setting up what is missing. The pages are tested in Chromium (apt-get install chromium), DICOM objects
# by dicom3tools and Orthanc (apt-get install dicom3tools orthanc orthanc-dicomweb); without, those tests are skipped.
#   ./test.sh                          checks and tests
#   ./test.sh --fast [ARGUMENT]        checks, and the tests that are not marked slow: under two minutes on two cores
#   ./test.sh --coverage [ARGUMENT]    the tests, and which lines of ensemble/ they reach (processes of their own don't count)
#   ./test.sh test/test_fusion.py -x   arguments go to pytest
#   ./test.sh --container [ARGUMENT]   build the images and test them under the platform's restrictions; needs a container engine
#                                      (test/container/engine.sh brings one on Debian); build.sh says which variables it takes
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh

container() {
    local docker=${DOCKER:-docker} torch version
    if ! "$docker" info >/dev/null 2>&1; then
        echo "no container engine answers to '$docker info'. Install Docker Engine and start it, set DOCKER or DOCKER_HOST," >&2
        echo "or as root on Debian: test/container/engine.sh ./test.sh --container" >&2
        return 1
    fi
    if "$docker" info --format '{{json .Runtimes}}' | grep -q nvidia && nvidia-smi -L >/dev/null 2>&1; then
        export CONTAINER_TEST_GPU=1
        echo "networks run on $(nvidia-smi -L | head -n 1)"
    else
        echo "no GPU, or an engine that gives containers none: networks run on the CPU"
    fi
    torch=$(grep -o '^torch==[0-9.]*' requirements.txt)
    if [ -n "${BASE_IMAGE:-}" ] && ! compgen -G "wheels/${torch/==/-}*" >/dev/null; then
        # a base image without torch: the wheel that pip finds here (see pip's find-links) serves the image too
        "$PY" -m pip download -q --disable-pip-version-check --no-deps -d wheels "$torch"
    fi
    export IMAGE=${IMAGE:-isles-ensemble}
    ./build.sh
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    CONTAINER_TEST_IMAGE=$IMAGE:$version exec "$PY" -m pytest test/container "$@"
}

need_venv dev
if [ "${1:-}" = --container ]; then
    shift
    container "$@"
fi
if [ $# -eq 0 ] || [ "$1" = --fast ]; then
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    "$PY" -m mypy & # without a cache it takes a minute, which another core has
    types=$!
fi
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
runner=(-m pytest)
if [ "${1:-}" = --coverage ]; then
    shift
    runner=(-m coverage run --source ensemble -m pytest)
fi
if [ "${runner[1]}" = pytest ] && { [ $# -eq 0 ] || [ "$1" = -m ]; }; then
    # a process a core, four at most, each with one thread; a file's tests stay together, since they share what is made once
    set -- -n auto --maxprocesses 4 --dist loadfile "$@"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
"$PY" "${runner[@]}" "$@" || failed=$?
[ "${runner[1]}" = pytest ] || "$PY" -m coverage report --skip-covered
[ -z "${types:-}" ] || wait "$types"
exit "${failed:-0}"
