# Cinecat's server for NVIDIA GPUs.
#
#   docker build -t cinecat .
#   docker run --gpus all --shm-size=1g --stop-timeout=60 -p 50051:50051 -p 9464:9464 \
#       -v cinecat-data:/var/lib/cinecat -v cinecat-models:/var/cache/cinecat \
#       cinecat --model Wan-AI/Wan2.1-I2V-14B-480P-Diffusers
#
# --shm-size: frames pass through /dev/shm, at most 4 at a time: in float32 (for frames_f32) 4 x width x height x 12
# bytes, which is 44 MB at 1280x720 and 398 MB at 3840x2160; a quarter of that for mp4 alone. Docker's default is 64 MB.
# Volumes: a folder of the host that is mounted instead must be writable for uid 10001.
# --stop-timeout: longer than drain_seconds (30), or Docker kills the job that a shutdown waits for.
#
# There is no authentication and no TLS yet: publish the ports on a trusted network only.

# A plain Python image: the wheels of torch and TensorRT bring CUDA's libraries themselves, and the driver comes from the
# host through the NVIDIA Container Toolkit. An image with CUDA in it would hold a second copy that nothing loads.
FROM python:3.11-slim

# What the toolkit mounts, for runtimes that ask the image instead of --gpus.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# The first process of a container: ends of processes whose parent was killed, such as ranks of an engine core, are seen.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/*

WORKDIR /usr/src/cinecat

# torch in a layer of its own: several GB that change only with its pin.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch

# TensorRT's libraries are fetched from NVIDIA's own package index while pip builds their wheel.
COPY . .
RUN pip install --constraint constraints.txt '.[tensorrt,postgres,otel,ray]'

# Data: the job database, inputs, clips and styles. Cache: checkpoints and engines, which can be fetched or built again.
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/cinecat --shell /usr/sbin/nologin cinecat \
    && mkdir -p /var/lib/cinecat/styles /var/cache/cinecat \
    && chown -R cinecat:cinecat /var/lib/cinecat /var/cache/cinecat
ENV CINECAT_ADDRESS=0.0.0.0:50051 \
    CINECAT_METRICS_HOST=0.0.0.0 \
    CINECAT_METRICS_PORT=9464 \
    CINECAT_DATA_DIR=/var/lib/cinecat \
    CINECAT_STYLES_DIRS=/var/lib/cinecat/styles \
    CINECAT_ENGINE_CACHE_DIR=/var/cache/cinecat/engines \
    HF_HOME=/var/cache/cinecat/huggingface
VOLUME ["/var/lib/cinecat", "/var/cache/cinecat"]

USER cinecat
WORKDIR /var/lib/cinecat
EXPOSE 50051 9464

# The standard gRPC health service. The start period leaves time to download a checkpoint; a failure counts from the
# first success on.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60m --retries=3 CMD ["python", "-c", "\
import grpc; \
from grpc_health.v1 import health_pb2, health_pb2_grpc; \
channel = grpc.insecure_channel('127.0.0.1:50051', [('grpc.enable_http_proxy', 0)]); \
answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5); \
raise SystemExit(answer.status != health_pb2.HealthCheckResponse.SERVING)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "cinecat", "serve"]
