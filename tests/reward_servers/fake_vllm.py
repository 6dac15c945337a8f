"""Stands in for vLLM's API server in tests of `judge up`: its command line, its key, its routes; judges brightness.

Started by the stand-in interpreter of `judge_helpers.stand_in_python`, so it takes what vLLM is given.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from judge_helpers import FakeJudge, leans, pictures_of


def by_brightness(body: dict[str, Any]) -> dict[str, Any]:
    share = float(pictures_of(body)[0].mean()) / 255
    return leans({"yes": max(0.9 * share, 1e-6), "no": max(0.9 * (1 - share), 1e-6), "the": 0.05}, body)


def make_app(served_name: str) -> FastAPI:
    app = FakeJudge(by_brightness, model=served_name).app()
    key = f"Bearer {os.environ['VLLM_API_KEY']}"

    @app.middleware("http")
    async def guard(request: Request, go_on: Any) -> Any:
        if request.url.path.startswith("/v1") and request.headers.get("authorization") != key:
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await go_on(request)

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in (
        "--model",
        "--host",
        "--served-model-name",
        "--dtype",
        "--max-num-seqs",
        "--structured-outputs-config",
        "--kv-cache-memory-bytes",
        "--max-model-len",
    ):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--ends", action="store_true")
    parser.add_argument("--never-ready", action="store_true")
    given = parser.parse_args()
    assert os.path.isdir(given.model)
    assert "SALON_REWARD_TOKEN" not in os.environ
    if given.ends:
        sys.exit("no such architecture")
    if given.never_ready:
        time.sleep(600)
    segment = SharedMemory(create=True, size=4096)  # as its engine has one; stays when the whole group is killed
    uvicorn.run(make_app(given.served_model_name), host=given.host, port=given.port, log_level="warning")
