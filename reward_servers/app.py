"""The HTTP face of one scorer: /v1/score, /v1/info, /livez, /readyz, /metrics.

| route          | token | answers                                                                                  |
|----------------|-------|------------------------------------------------------------------------------------------|
| POST /v1/score | yes   | a codec blob (ScoreResponse and table), or {"error"} and a status that names the mistake  |
| GET /v1/info   | yes   | ScorerInfo                                                                               |
| GET /livez     | no    | 200, or 503 when one call of the scorer hangs: restart it                                |
| GET /readyz    | no    | 200, or 503 with the reason: loading, canary failed, queue full, draining                |
| GET /metrics   | no    | Prometheus text                                                                          |
| /openapi.json  | no    | all of this for machines (openapi.py)                                                    |

A scorer that raises or answers NaN is no HTTP error: its entries are FAILED in a 200 answer.
Does not own: parsing and limits (intake), the queue (batching), sockets and signals (serving).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from contracts.errors import ScoringError
from contracts.scores import ScorerInfo, ScoreTable
from reward_servers import openapi
from reward_servers.batching import Batcher, QueueFull
from reward_servers.intake import Job, Refusal, parse, read_body
from reward_servers.isolation import score_isolated
from reward_servers.scorers.base import Scorer
from reward_servers.settings import ServerSettings
from reward_servers.telemetry import Telemetry

log = logging.getLogger(__name__)

T = TypeVar("T")

_LARGE_BYTES = 2**20


class Service:
    """One scorer being served: its state between loading and draining, and what a request does to it."""

    def __init__(self, scorer: Scorer, settings: ServerSettings, token: str | None) -> None:
        self.scorer, self.settings = scorer, settings
        self._token = token
        self.telemetry = Telemetry(scorer.name)
        scorer.meter = self.telemetry.meter
        self.batcher = Batcher(
            scorer, max_batch=settings.max_batch, max_wait_s=settings.max_wait_s, capacity=settings.queue,
            on_batch=self.telemetry.scored,
        )  # fmt: skip
        self.loaded = False
        self.telemetry.watch(lambda: self.batcher.depth, settings.queue, lambda: self.not_ready() is None)

    async def load(self) -> None:
        """Load weights and score the canary. Raises what the scorer raised, or ScoringError for a failed canary."""
        await self.batcher.call(self.scorer.load)
        table = await self.batcher.call(lambda: score_isolated(self.scorer, self.scorer.canary()))
        if table is None or (table.kind != "pair" and not table.valid().all()):
            reason = table.reasons[0] if table is not None and table.reasons else "no valid score"
            raise ScoringError(f"scorer {self.scorer.name!r} could not score its canary: {reason}")
        self.loaded = True

    def not_ready(self) -> str | None:
        """Why /readyz says no, or None."""
        if self.batcher.draining:
            return "draining"
        if not self.loaded:
            return "loading"
        if self.batcher.depth >= self.settings.queue:
            return "queue full"
        return self.scorer.unready()

    def info(self) -> ScorerInfo:
        scorer, settings = self.scorer, self.settings
        return ScorerInfo(
            name=scorer.name, version=scorer.version, kind=scorer.declares.kind, columns=scorer.declares.columns,
            higher_is_better=scorer.higher_is_better, value_range=scorer.value_range,
            offers_gradients=scorer.declares.gradients, accepts=scorer.declares.accepts,
            max_images=settings.images_per_request, max_pixels=settings.max_pixels,
            max_body_bytes=settings.max_body_bytes, paper=scorer.paper, weight_digest=scorer.weight_digest,
            whole_group=scorer.declares.needs_group, pairs=scorer.pairs_asked,
        )  # fmt: skip

    def authorise(self, request: Request) -> None:
        """Raises Refusal 401 unless the bearer token is right; compared in constant time, never logged."""
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not right:
            raise Refusal(401, "a valid bearer token is required")

    async def score(self, request: Request) -> bytes:
        """The answer to one request. Raises Refusal."""
        self._admit()
        body = await read_body(request.stream(), request.headers.get("content-length"), self.settings)
        job = await self._job(body)
        self._admit()
        wait = min(job.header.deadline_s or math.inf, self.settings.max_seconds)
        try:
            futures = self.batcher.submit(job.batches, time.monotonic() + wait)
        except QueueFull as error:
            raise Refusal(429, str(error), error.retry_after_s) from error
        tables = await _results(request, futures, wait)
        table, answer = await _aside(len(body), lambda: job.answer(tables))
        if job.header.version not in ("latest", table.version):  # another was taken up while the request waited
            raise Refusal(409, f"version {job.header.version!r} is gone; this server has {self.scorer.version!r}")
        self.telemetry.answered(table)
        return answer

    async def _job(self, body: bytes) -> Job:
        """A request parsed; the version it asks for may only just have come. Raises Refusal."""
        try:
            return await _aside(len(body), lambda: parse(body, self.scorer, self.settings))
        except Refusal as refusal:
            if refusal.status != 409 or not self.scorer.follows:
                raise
        await self.batcher.call(self.scorer.refresh)
        return await _aside(len(body), lambda: parse(body, self.scorer, self.settings))

    def _admit(self) -> None:
        """Turns a request away before its body is read, or queued, when it could not be served now."""
        reason = self.not_ready()
        if reason == "queue full":
            raise Refusal(429, reason, self.batcher.retry_after_s())
        if reason is not None:
            raise Refusal(503, reason, 1.0)


async def _results(request: Request, futures: list[asyncio.Future[ScoreTable]], wait: float) -> list[ScoreTable]:
    """The tables of a job, unless the deadline passes or the caller hangs up first: then the work is taken back."""
    everything: asyncio.Future[list[ScoreTable]] = asyncio.gather(*futures)
    gone: asyncio.Future[None] = asyncio.create_task(_disconnected(request))
    try:
        either: list[asyncio.Future[Any]] = [everything, gone]
        await asyncio.wait(either, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        if everything.done():
            return everything.result()
        raise Refusal(499, "the caller hung up") if gone.done() else TimeoutError
    except TimeoutError:
        raise Refusal(504, f"no score within {wait:g} s") from None
    finally:
        gone.cancel()
        if not everything.done():
            everything.cancel()
            with suppress(asyncio.CancelledError):
                await everything


async def _aside(num_bytes: int, work: Callable[[], T]) -> T:
    """Large bodies are unpacked in a thread; for small ones the way there costs more than the work."""
    return await asyncio.to_thread(work) if num_bytes > _LARGE_BYTES else work()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(service: Service) -> FastAPI:
    """The application of one service. Interactive documentation is off: the one body type is binary."""
    app = FastAPI(title=f"Salon scorer {service.scorer.name}", docs_url=None, redoc_url=None)
    openapi.describe(app)

    @app.post("/v1/score", **openapi.SCORE)
    async def score(request: Request) -> Response:
        start = time.monotonic()
        response = await _answer(service, request, lambda: service.score(request))
        service.telemetry.request(response.status_code, time.monotonic() - start)
        return response

    @app.get("/v1/info", **openapi.INFO)
    async def info(request: Request) -> Response:
        async def body() -> bytes:
            if not service.loaded:
                raise Refusal(503, "loading", 1.0)
            if service.scorer.follows and service.batcher.idle:
                await service.batcher.call(service.scorer.refresh)
            return service.info().model_dump_json().encode()

        return await _answer(service, request, body, "application/json")

    @app.get("/livez", **openapi.LIVE)
    async def livez() -> Response:
        hangs = service.batcher.busy_seconds > service.settings.stall_seconds
        return PlainTextResponse("the scorer hangs" if hangs else "ok", 503 if hangs else 200)

    @app.get("/readyz", **openapi.READY)
    async def readyz() -> Response:
        reason = service.not_ready()
        return PlainTextResponse(reason or "ok", 503 if reason else 200)

    @app.get("/metrics", **openapi.METRICS)
    async def metrics() -> Response:
        return PlainTextResponse(service.telemetry.exposition(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    return app


async def _answer(
    service: Service, request: Request, make: Callable[[], Awaitable[bytes]], media_type: str = openapi.MEDIA_TYPE
) -> Response:
    """The bytes that `make` yields, or the JSON of what went wrong; never a traceback to the caller."""
    try:
        service.authorise(request)
        return Response(await make(), media_type=media_type)
    except Refusal as refusal:
        return _refused(refusal)
    except Exception as error:
        log.exception("internal error")
        return JSONResponse({"error": f"internal error: {type(error).__name__}"}, 500)


def _refused(refusal: Refusal) -> Response:
    headers: dict[str, Any] = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(refusal.retry_after_s))
    if refusal.status in (401, 408, 413):
        headers["Connection"] = "close"  # else the rest of a body that nobody wants would be read to its end
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": refusal.message}, refusal.status, headers)
