"""One URL of a scorer: a single exchange over HTTP, with every answer distrusted until checked.

Bodies are read with a limit while they stream, so 50 MB of garbage are never held; a slow drip ends with the timeout.
Does not own: retries and fail-over (persist), what a table must satisfy (tables).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import httpx
from pydantic import ValidationError

from contracts.codec import decode, encode
from contracts.errors import PayloadError
from contracts.scores import Outcome, ScoreRequest, ScoreResponse, ScorerInfo, ScoreTable
from reward_servers.client.breaker import CircuitBreaker
from reward_servers.client.parts import Part
from reward_servers.client.tables import Expected, build_table

T = TypeVar("T")

_ERROR_BYTES = 4096
_INFO_BYTES = 64 * 1024


@dataclass(eq=False)
class AttemptFailed(Exception):
    """Why one exchange brought no table.

    cause: short name for counters. retry: "no" final; "elsewhere" by another replica only; "yes" costs one of
    max_retries and of the budget; "wait" the server is away or busy, so the deadline alone bounds it.
    blames: counts against the circuit of this URL.
    """

    cause: str
    reason: str
    outcome: Outcome = Outcome.FAILED
    retry: str = "yes"
    blames: bool = True
    retry_after_s: float = 0.0

    def __str__(self) -> str:
        return self.reason


class Endpoint:
    """A URL with its circuit breaker. busy_until: monotonic time before which the server asked to be left alone."""

    def __init__(self, url: str, breaker: CircuitBreaker) -> None:
        self.url, self.breaker = url.rstrip("/"), breaker
        self.busy_until = 0.0
        self.in_flight = 0

    def wait_s(self, now: float) -> float:
        """Seconds until it may be asked."""
        return max(self.breaker.wait_s(now), self.busy_until - now, 0.0)

    async def score(
        self, http: httpx.AsyncClient, request: ScoreRequest, part: Part, expected: Expected, timeout_s: float
    ) -> ScoreTable:
        """The checked table of one request. Raises AttemptFailed."""
        try:
            blob = await _aside(part.num_bytes, lambda: encode(request, part.arrays()))
        except ValueError as error:  # metadata that is no JSON
            raise AttemptFailed("request", f"the request cannot be sent: {error}", retry="no", blames=False) from error
        body = await self._exchange(http, "POST", "/v1/score", blob, timeout_s, part.answer_limit(expected))
        try:
            response, arrays = await _aside(len(body), lambda: decode(body, ScoreResponse))
            if response.request_id != request.request_id:
                raise PayloadError("the answer belongs to another request")
            if request.version not in ("latest", response.table.version):
                raise PayloadError(f"answered by version {response.table.version!r}, not {request.version!r}")
            return await _aside(len(body), lambda: build_table(response.table, arrays, expected))
        except (PayloadError, ValueError, TypeError) as error:
            raise AttemptFailed("garbage", f"{self.url} answered nonsense: {error}") from error

    async def info(self, http: httpx.AsyncClient, timeout_s: float) -> ScorerInfo:
        """GET /v1/info. Raises AttemptFailed."""
        body = await self._exchange(http, "GET", "/v1/info", None, timeout_s, _INFO_BYTES)
        try:
            return ScorerInfo.model_validate_json(body)
        except ValidationError as error:
            raise AttemptFailed("garbage", f"{self.url}/v1/info is not a Salon reward server", retry="no") from error

    async def _exchange(
        self, http: httpx.AsyncClient, method: str, path: str, content: bytes | None, timeout_s: float, limit: int
    ) -> bytes:
        try:
            async with (
                asyncio.timeout(timeout_s),
                http.stream(method, self.url + path, content=content) as response,
            ):
                if response.status_code != 200:
                    raise self._refused(response, await _read(response, _ERROR_BYTES, cut=True))
                return await _read(response, limit)
        except (TimeoutError, httpx.TimeoutException) as error:
            reason = f"{self.url} did not answer within {timeout_s:.3g} s"
            if isinstance(error, httpx.ConnectTimeout):
                raise AttemptFailed("unreachable", reason, Outcome.TIMED_OUT, "wait") from error
            raise AttemptFailed("timeout", reason, Outcome.TIMED_OUT) from error
        except httpx.ConnectError as error:
            raise AttemptFailed("unreachable", f"{self.url} cannot be reached ({error})", retry="wait") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            text = f"{type(error).__name__} {error}".strip()
            raise AttemptFailed("connection", f"{self.url} broke the connection ({text})") from error

    def _refused(self, response: httpx.Response, body: bytes) -> AttemptFailed:
        status = response.status_code
        reason = f"{self.url} answered {status}: {_error_text(body)}"
        retry_after_s = _seconds(response.headers.get("retry-after"))
        if status in (429, 503):
            self.busy_until = max(self.busy_until, time.monotonic() + min(max(retry_after_s, 0.1), 60.0))
            return AttemptFailed(str(status), reason, retry="wait", blames=status == 503, retry_after_s=retry_after_s)
        if status == 504:
            return AttemptFailed("504", reason, Outcome.TIMED_OUT)
        if status >= 500 or status == 408:
            return AttemptFailed(str(status), reason)
        elsewhere = status in (401, 403, 404, 409)  # another replica may have the version, or the right token
        return AttemptFailed(str(status), reason, retry="elsewhere" if elsewhere else "no", blames=False)


async def _read(response: httpx.Response, limit: int, cut: bool = False) -> bytes:
    """The body as sent. Raises AttemptFailed beyond `limit` bytes, or cuts there."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise AttemptFailed("garbage", "the answer is compressed, which was not asked for")
    declared = response.headers.get("content-length", "")
    if not cut and declared.isdigit() and int(declared) > limit:
        raise AttemptFailed("garbage", f"an answer of {declared} bytes cannot be right (at most {limit})")
    body = bytearray()
    async for chunk in response.aiter_raw(64 * 1024):
        body += chunk
        if len(body) > limit:
            if cut:
                break
            raise AttemptFailed("garbage", f"an answer of more than {limit} bytes cannot be right")
    return bytes(body[:limit])


def _error_text(body: bytes) -> str:
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return " ".join(text.split())[:200] or "no message"


def _seconds(retry_after: str | None) -> float:
    """Retry-After in seconds; dates and nonsense count as 1."""
    if retry_after is None:
        return 0.0
    try:
        return min(max(float(retry_after), 0.0), 60.0)
    except ValueError:
        return 1.0


async def _aside(num_bytes: int, work: Callable[[], T]) -> T:
    """Large bodies are packed and unpacked in a thread, so that the event loop goes on."""
    return await asyncio.to_thread(work) if num_bytes > 2**20 else work()
