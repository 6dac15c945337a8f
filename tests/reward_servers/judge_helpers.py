"""What the tests of judges share: a real HTTP server that speaks OpenAI's chat protocol, and answers as told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from contracts.config.judges import JudgeOptions
from reward_servers.judging.judge import Judge

VOCABULARY = {
    text: index
    for index, text in enumerate(
        ["yes", "Yes", " yes", " Yes", "YES", "no", "No", " no", " No", "NO", "the", *"0123456789", *"ABCDEFGHIJ"]
    )
}
SPELLING = {index: text for text, index in VOCABULARY.items()}

Answer = dict[str, Any] | Response
Behave = Callable[[dict[str, Any]], Answer | Awaitable[Answer]]


def says(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A completion with a text."""
    message = {"role": "assistant", "content": text, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": USAGE}


USAGE = {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103}


def leans(probabilities: Mapping[str, float], body: dict[str, Any]) -> dict[str, Any]:
    """A completion whose first token has these probabilities; with logprob_token_ids exactly those come back."""
    wanted = body.get("logprob_token_ids")
    listed = sorted(probabilities.items(), key=lambda item: -item[1])
    if wanted is not None:
        listed = [(SPELLING[i], probabilities.get(SPELLING[i], 1e-30)) for i in wanted]
    tokens = [{"token": text, "logprob": math.log(p), "bytes": None} for text, p in listed[: body["top_logprobs"]]]
    best = max(probabilities, key=lambda text: probabilities[text])
    first = {"token": best, "logprob": math.log(probabilities[best]), "top_logprobs": tokens}
    answer = says(best, "length")
    answer["choices"][0]["logprobs"] = {"content": [first]}
    return answer


def texts_of(body: dict[str, Any]) -> str:
    """Everything said to the judge, pictures left out."""
    parts = [p for m in body["messages"] for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
    return "\n".join(part if isinstance(part, str) else part["text"] for part in parts if "image_url" not in part)


def pictures_of(body: dict[str, Any]) -> list[np.ndarray]:
    """The pictures shown, decoded: uint8 [H,W,3]."""
    parts = [p for m in body["messages"] if not isinstance(m["content"], str) for p in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls), "images travel by value"
    blobs = [base64.b64decode(url.partition(",")[2]) for url in urls]
    return [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in blobs]


@dataclass
class FakeJudge:
    """The state of one fake server. tokenizes: whether it has /tokenize and logprob_token_ids, as vLLM has."""

    behave: Behave
    tokenizes: bool = True
    model: str = "judge"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorisations: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.authorisations.append(request.headers.get("authorization"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = self.behave(body)
            answer = await answer if not isinstance(answer, dict | Response) else answer
        finally:
            self.in_flight -= 1
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"], response_model=None)

        @app.get("/v1/models")
        async def models() -> Any:
            return {"object": "list", "data": [{"id": self.model, "object": "model"}]}

        @app.get("/health")
        async def health() -> Any:
            return {}

        if self.tokenizes:

            @app.post("/tokenize")
            async def tokenize(request: Request) -> Any:
                text = (await request.json())["prompt"]
                known = [VOCABULARY[text]] if text in VOCABULARY else [1000 + ord(c) for c in text]
                return {"tokens": known, "count": len(known)}

        return app


@contextmanager
def judging(behave: Behave, **settings: Any) -> Iterator[FakeJudge]:
    """A fake judge on a free loopback port, in a thread of this process."""
    fake = FakeJudge(behave, **settings)
    server = uvicorn.Server(uvicorn.Config(fake.app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


def options_for(*urls: str, **fields: Any) -> JudgeOptions:
    """Times that a busy machine keeps; a test about time names its own."""
    quick = {"timeout_s": 30.0, "deadline_s": 60.0, "breaker_reset_s": 0.2, "model": "judge", "hedge_quantile": None}
    return JudgeOptions(urls=urls, **{**quick, **fields})


def consult(options: JudgeOptions, work: Callable[[Judge], Awaitable[Any]], **more: Any) -> Any:
    """The result of some questions to a fresh Judge, closed afterwards."""

    async def go() -> Any:
        async with Judge(options, **more) as judge:
            return await work(judge)

    return asyncio.run(go())


def flat(level: int | tuple[int, int, int], size: int = 8) -> np.ndarray:
    """A picture of one colour."""
    return np.full((size, size, 3), level, np.uint8)


def brightness(image: np.ndarray) -> float:
    return float(image.mean())


def filled(body: dict[str, Any], answer: Callable[[list[str], list[np.ndarray]], dict[str, Any]]) -> dict[str, Any]:
    """A listwise judge's JSON: answer(names, pictures in the order of the names)."""
    names = re.findall(r"^Image ([A-Z]):$", texts_of(body), re.MULTILINE)
    return says(json.dumps(answer(names, pictures_of(body))))


def stand_in_python(folder: Path) -> Path:
    """An "interpreter of the environment with vLLM" whose vLLM is fake_vllm."""
    here = Path(__file__).resolve()
    script = folder / "python"
    path = f"{here.parent}:{here.parents[2]}"
    script.write_text(
        '#!/bin/sh\n[ "$1 $2" = "-m vllm.entrypoints.openai.api_server" ] || exit 9\nshift 2\n'
        f'PYTHONPATH={path} exec {sys.executable} -m fake_vllm "$@"\n'
    )
    script.chmod(0o755)
    return script
