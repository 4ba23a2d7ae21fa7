# docker build -t bdh-batch .                              for CPUs
# docker build -t bdh-batch:cuda --build-arg VARIANT=cuda .     for NVIDIA GPUs (run with --gpus all)
# docker build -t bdh-batch --build-arg EXTRAS=redis,s3 .       with extras of the package
#
# The default package index has torch with CUDA only, which runs on CPUs too but is large. A smaller image for CPUs takes
# torch from PyTorch's own index of CPU builds: --build-arg TORCH_INDEX=its address.

FROM python:3.11-slim AS builder
ARG VARIANT=cpu
ARG TORCH_INDEX=
ARG EXTRAS=
WORKDIR /src

COPY constraints.txt ./
RUN python -m pip install --no-cache-dir -c constraints.txt hatchling
# Without a pip of its own, which the running server does not need.
RUN python -m venv --without-pip /opt/bdh-batch

# torch first and alone: the largest layer, made again only when the versions change.
RUN case "$VARIANT" in \
    cpu) python -m pip --python /opt/bdh-batch/bin/python install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--no-deps --index-url "$TORCH_INDEX"} torch ;; \
    cuda) python -m pip --python /opt/bdh-batch/bin/python install --no-cache-dir -c constraints.txt torch triton ;; \
    *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 2 ;; \
    esac

COPY pyproject.toml README.md LICENSE ./
COPY bdh_batch bdh_batch
COPY models/bdh-shakespeare models/bdh-shakespeare
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .
RUN python -m pip --python /opt/bdh-batch/bin/python install --no-cache-dir -c constraints.txt \
    "$(echo /dist/*.whl)${EXTRAS:+[$EXTRAS]}"


FROM python:3.11-slim
RUN useradd --create-home --uid 10001 bdh
COPY --from=builder /opt/bdh-batch /opt/bdh-batch
ENV PATH=/opt/bdh-batch/bin:$PATH
ENV PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER bdh
WORKDIR /home/bdh
EXPOSE 8000
# An answer other than 200 raises, so that the exit code is 1: while the model loads and while the server drains.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('BDH_SERVER__PORT', 8000)}/readyz\", timeout=4)"]
CMD ["bdh-batch", "serve", "--host", "0.0.0.0"]
