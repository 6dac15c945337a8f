# One reward server: one scorer behind HTTP. Build from the repository root:
#   docker build -f docker/reward.Dockerfile -t salon-reward .
#   docker run -e SALON_REWARD_TOKEN -p 8000:8000 salon-reward clip
# The token comes from the environment; without one the server refuses to listen beyond loopback.

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
COPY docker/locks/reward.txt /tmp/reward.txt
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /tmp/reward.txt

FROM python:3.11.13-slim-bookworm
RUN groupadd --gid 1000 salon && useradd --uid 1000 --gid 1000 --create-home salon
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY contracts contracts
COPY playground/__init__.py playground/__init__.py
COPY playground/world playground/world
COPY playground/scorer playground/scorer
COPY reward_servers reward_servers
COPY LICENSE ./
COPY docker/healthcheck.py docker/healthcheck.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1
USER 1000:1000
EXPOSE 8000
# Healthy: weights are loaded, the canary is scored, the queue is not full.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "docker/healthcheck.py", "url", "http://127.0.0.1:8000/readyz"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "reward_servers", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["playground_verifier"]
