"""A judge that takes as long as a small vLLM on this machine and knows nothing: what judge.py measures against.

POST /v1/chat/completions of an OpenAI-compatible server, with log-probs of a fixed lean towards yes. One request after
another holds its one "device" for `seconds`, so requests/s have a ceiling that the caller's cleverness cannot move.

    python -m benchmarks.judge_endpoint SECONDS READY_FILE
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

MODEL = "stand-in"
SHARES = {"Yes": 0.6, "No": 0.3, "the": 0.05}


def completion() -> dict[str, Any]:
    """An answer with the probabilities of SHARES at its first token."""
    tokens = [{"token": text, "logprob": math.log(share)} for text, share in SHARES.items()]
    choice = {
        "index": 0, "message": {"role": "assistant", "content": "Yes"}, "finish_reason": "length",
        "logprobs": {"content": [{**tokens[0], "top_logprobs": tokens}]},
    }  # fmt: skip
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}}


def make_app(seconds: float) -> FastAPI:
    app, device, answer = FastAPI(), asyncio.Lock(), completion()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        try:
            json.loads(await request.body())
        except ClientDisconnect:
            return {}
        async with device:
            if not await request.is_disconnected():  # the loser of a hedge is dropped, as vLLM does
                await asyncio.sleep(seconds)
        return answer

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    return app


async def serve(seconds: float, ready: Path) -> None:
    server = uvicorn.Server(uvicorn.Config(make_app(seconds), port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    ready.with_suffix(".tmp").write_text(f"http://127.0.0.1:{port}")
    ready.with_suffix(".tmp").rename(ready)
    await serving


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]), Path(sys.argv[2])))
