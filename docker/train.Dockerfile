# Driver, controller, vaults, actors and learner ranks of a run. Build from the repository root:
#   docker build -f docker/train.Dockerfile -t salon-train .
# torch brings its own CUDA; the host brings the driver (NVIDIA container toolkit). Without a GPU it runs on the CPU.

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
COPY docker/locks/build.txt docker/locks/train.txt /tmp/
# No build isolation: it would fetch unpinned packages to build DeepSpeed's wheel.
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /tmp/build.txt \
    && /opt/venv/bin/pip install --require-hashes --no-deps --no-build-isolation -r /tmp/train.txt

FROM python:3.11.13-slim-bookworm
# g++ and ninja (from the lock): DeepSpeed compiles a small operator at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 salon \
    && useradd --uid 1000 --gid 1000 --create-home salon \
    && install --directory --owner=1000 --group=1000 /runs
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY contracts contracts
COPY policy policy
COPY playground playground
COPY actors actors
COPY reward_servers reward_servers
COPY learner learner
COPY cluster cluster
COPY configs configs
COPY pyproject.toml LICENSE ./
COPY docker/healthcheck.py docker/healthcheck.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    RAY_AUTH_MODE=token \
    TORCH_EXTENSIONS_DIR=/home/salon/.cache/torch_extensions
USER 1000:1000
VOLUME /runs
EXPOSE 9400
# Healthy: the controller answers /metrics. Until it has started the start period counts.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=4 \
    CMD ["python", "docker/healthcheck.py", "run", "/runs"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "cluster"]
CMD ["--help"]
