# The base image of grand-challenge's starter kit: CUDA 12.6 is what its T4 hosts run, and it brings the torch that we pin.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime

# What the layers are made from, without a layer of its own in the images: requirements, and wheels if someone laid some into wheels/...
FROM ${BASE_IMAGE} AS requirements
COPY requirements.txt wheels* /requirements/
COPY locks /requirements/locks
COPY image /requirements/image

# ... and the program. Not under /opt/ml/model, which the platform mounts over; that folder is used when it holds something.
FROM ${BASE_IMAGE} AS program
COPY model_weights /program/model_weights
COPY ensemble /program/ensemble
COPY process.py LICENSE /program/

# Both layers are made by image/layer.sh, with this date on each file: the same content makes the same layer.
FROM ${BASE_IMAGE} AS application
ARG SOURCE_DATE_EPOCH=315532800
# The certificate bundle is optional and stays in no layer. /mnt and /dev/shm are there in every base image, so that mounts leave no trace.
RUN --mount=type=bind,from=requirements,source=/requirements,target=/mnt \
    --mount=type=secret,id=ca,target=/dev/shm/ca.pem,mode=0444 \
    /mnt/image/layer.sh /mnt/image/packages.sh /mnt
RUN --mount=type=bind,from=program,source=/program,target=/mnt \
    --mount=type=bind,from=requirements,source=/requirements/image,target=/media \
    /media/layer.sh /media/program.sh /mnt
# The root file system is read-only on the platform and HOME may be missing: what libraries cache goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /opt/app
USER 10001:10001
ENTRYPOINT ["python", "/opt/app/process.py"]

# grand-challenge's HTTP mode; its label is what the platform goes by. Not ready is not healthy: 300 s is what the platform waits.
FROM application AS invoke
LABEL org.grand-challenge.api-method="invoke"
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 4743, timeout=9); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
CMD ["serve"]

# The default: one case, then exit. Both images share all layers.
FROM application AS exec
# what dataset_description.json of a batch names as its container
ARG TAG=isles-ensemble
ENV CONTAINER_TAG=${TAG}
