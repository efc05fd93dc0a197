# An encode server on NVIDIA GPUs:
#
#   docker build -t encode-server .
#   docker run --gpus all -p 30000:30000 -v encode-cache:/cache encode-server serve Qwen/Qwen2.5-VL-7B-Instruct --tp 2
#
# and one for CPUs, a fifth of the size:
#
#   docker build -t encode-server:cpu --build-arg BASE=ubuntu:24.04 --build-arg TORCH=cpu .
#
# On other devices (nobody has built these two yet): ROCm, and an NVIDIA driver that is too old for CUDA 13:
#
#   docker build -t encode-server:rocm --build-arg BASE=rocm/dev-ubuntu-24.04:7.2 --build-arg TORCH=rocm7.2 .
#   docker build -t encode-server:cu126 --build-arg BASE=nvidia/cuda:12.6.3-base-ubuntu24.04 --build-arg TORCH=cu126 .
#   docker run --device /dev/kfd --device /dev/dri --group-add video --group-add render … encode-server:rocm
#
# Any option can be given as ENCODE_SERVER_* instead (`docker run encode-server serve --help` lists them). The port is
# best left to ENCODE_SERVER_PORT, because the health check reads it. Useful beside the above:
#   -e HF_TOKEN=…              for checkpoints that ask for one
#   --init                     reaps whatever a dying process leaves
#   --stop-timeout 30          longer than the server's grace period for accepted work
#   --shm-size 1g              for NCCL, with --tp 2 and more
#
# What an image contains, and under which licences: see NOTICE. The packages take 5.6 GB with CUDA's libraries (3.1 GB of
# them NVIDIA's own, proprietary) and 1.1 GB without, beside the base image.

# `base` has the device's runtime and what the driver's hooks need; torch brings its other CUDA libraries itself.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
# `cuda`: torch as the package index has it. Else one of PyTorch's own builds, as uv names them (`--torch-backend`): `cpu`
# (without NVIDIA's libraries), `rocm7.2`, `cu126`, …
ARG TORCH=cuda
# The package's extras: "server ray" for a Ray cluster, "server otel" for traces.
ARG EXTRAS=server

FROM ${BASE} AS build
ARG TORCH
ARG EXTRAS
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv
ENV UV_LINK_MODE=copy \
    UV_PYTHON=/app/.venv/bin/python \
    UV_COMPILE_BYTECODE=1
WORKDIR /app
RUN /opt/uv/bin/uv venv --python /usr/bin/python3 .venv
# The dependencies first: gigabytes that change rarely, in a layer that a change of the code leaves alone. Their versions
# and hashes are those of constraints.txt. PyTorch's own builds have other hashes than the index's: there the version holds.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "$TORCH" != cuda ]; then \
        awk '/^[a-z]/ {bare = /^(torch|torchvision)==/} \
             bare {if (/^[a-z]/) {sub(/ *\\$/, ""); print}; next} \
             {print}' constraints.txt > chosen.txt \
        && export UV_TORCH_BACKEND="$TORCH"; \
    else cp constraints.txt chosen.txt; fi \
    && /opt/uv/bin/uv pip install --constraint chosen.txt --requirement pyproject.toml $(printf -- '--extra %s ' $EXTRAS)
COPY README.md LICENSE NOTICE ./
COPY encode_server ./encode_server
RUN --mount=type=cache,target=/root/.cache/uv /opt/uv/bin/uv pip install --no-deps .

FROM ${BASE}
ARG TORCH
# On a GPU, Triton compiles a part of each kernel's launch in C, against Python's headers, when a rank starts. Without a
# compiler the ranks take slower kernels, and say so in the log.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
        $([ "$TORCH" = cpu ] || echo gcc libc6-dev libpython3-dev) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home encode \
    && install -d -o encode -g encode /cache
COPY --from=build /app/.venv /app/.venv
COPY LICENSE NOTICE /usr/share/doc/encode-server/
# Empty, so that torch finds the libraries it was built with and not older ones of the base image.
ENV LD_LIBRARY_PATH="" \
    PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/tmp/triton \
    ENCODE_SERVER_HOST=0.0.0.0 \
    ENCODE_SERVER_PORT=30000
# By number: Kubernetes' runAsNonRoot cannot tell what a name stands for.
USER 10001:10001
WORKDIR /home/encode
VOLUME /cache
EXPOSE 30000
# /health encodes something small; it is 503 while the weights load, hence the long start.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 CMD ["python", "-c", "\
import http.client as h, os, ssl, sys; \
at = dict(host='127.0.0.1', port=int(os.environ['ENCODE_SERVER_PORT']), timeout=4); \
tls = os.environ.get('ENCODE_SERVER_SSL_CERTFILE'); \
server = h.HTTPSConnection(**at, context=ssl._create_unverified_context()) if tls else h.HTTPConnection(**at); \
server.request('GET', '/health'); \
sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["encode-server"]
CMD ["serve", "demo"]
