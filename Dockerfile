# An encode server on NVIDIA GPUs (or, without `--gpus`, on the CPU).
#
#   docker build -t encode-server .
#   docker run --gpus all -p 30000:30000 -v encode-cache:/cache encode-server serve Qwen/Qwen2.5-VL-7B-Instruct --tp 2
#
# Any option can be given as ENCODE_SERVER_* instead (`docker run encode-server serve --help` lists them). The port is
# best left to ENCODE_SERVER_PORT, because the health check reads it. Useful beside the above:
#   -e HF_TOKEN=…              for checkpoints that ask for one
#   --init                     reaps whatever a dying rank leaves
#   --stop-timeout 30          longer than the server's grace period for accepted work
#   --shm-size 1g              for NCCL, with --tp 2 and more

# `base` has the CUDA runtime and what the driver's hooks need; torch brings its other CUDA libraries itself.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv
ENV UV_LINK_MODE=copy \
    UV_PYTHON=/usr/bin/python3 \
    UV_PYTHON_DOWNLOADS=never \
    UV_COMPILE_BYTECODE=1
WORKDIR /app
# The dependencies first: gigabytes that change rarely, in a layer that a change of the code leaves alone.
COPY pyproject.toml README.md ./
RUN --mount=type=cache,target=/root/.cache/uv /opt/uv/bin/uv sync --no-dev --no-install-project
COPY encode_server ./encode_server
RUN --mount=type=cache,target=/root/.cache/uv /opt/uv/bin/uv sync --no-dev --no-editable

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home encode \
    && install -d -o encode -g encode /cache
COPY --from=build /app/.venv /app/.venv
# Empty, so that torch finds the libraries it was built with and not older ones of the base image.
ENV LD_LIBRARY_PATH="" \
    PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    ENCODE_SERVER_HOST=0.0.0.0 \
    ENCODE_SERVER_PORT=30000
USER encode
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
