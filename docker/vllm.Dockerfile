# vLLM alone, for judges: an OpenAI-compatible endpoint that a judge's reward server asks. Needs an NVIDIA GPU.
#   docker build -f docker/vllm.Dockerfile -t salon-vllm .
#   docker run --gpus all -v /models:/models:ro salon-vllm --model /models/judge
# vLLM's --api-key covers /v1 only: keep the port on a private network.

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
COPY docker/locks/vllm.txt /tmp/vllm.txt
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /tmp/vllm.txt

FROM python:3.11.13-slim-bookworm
# Triton compiles its launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 salon \
    && useradd --uid 1000 --gid 1000 --create-home salon
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY docker/healthcheck.py docker/healthcheck.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    HF_HUB_OFFLINE=1
USER 1000:1000
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "docker/healthcheck.py", "url", "http://127.0.0.1:8001/health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "vllm.entrypoints.openai.api_server", "--host", "0.0.0.0", "--port", "8001"]
CMD ["--model", "/models/judge"]
