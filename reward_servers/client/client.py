"""RewardClient: asks the replicas of one scorer and always comes back with a table within the deadline.

What goes wrong on the way becomes outcomes with reasons, never an exception and never a number:

| what                                    | then                                                               |
|-----------------------------------------|--------------------------------------------------------------------|
| 500, 504, timeout, lost connection,     | retried with exponential back-off and jitter, on another replica   |
| nonsense for an answer                  | if there is one, up to max_retries and while the budget lasts      |
| server away (connection refused, 503)   | waited for until the deadline; the circuit opens, one probe at a   |
|                                         | time: a restart of a server costs seconds, not groups              |
| 429                                     | left alone for Retry-After, until the deadline: delays, never fails |
| 401, 403, 404, 409                      | asked of each replica once, then FAILED                            |
| other 4xx                               | FAILED at once: the same request would be refused again            |
| 200 with failed or non-finite entries   | those entries FAILED, the others kept                              |

Does not own: one exchange (endpoint), retries and fail-over (persist), circuit and budget (breaker), cutting into
requests (parts).
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import httpx
import numpy as np
from pydantic import ValidationError

from contracts.config.scoring import ScorerConfig
from contracts.declarations import ScorerGives
from contracts.errors import ConfigError, PayloadError, ScoringError
from contracts.scores import Outcome, ScoreRequest, ScorerInfo, ScoreTable
from reward_servers.client.breaker import CircuitBreaker, RetryBudget
from reward_servers.client.endpoint import AttemptFailed, Endpoint
from reward_servers.client.parts import Images, Part, make_part
from reward_servers.client.persist import Persistence
from reward_servers.client.stats import ClientStats
from reward_servers.client.tables import Expected, blank_table, join

_HEADER_BYTES = 64 * 1024  # room for prompts and metadata beside the pixels in max_body_bytes


class RewardClient:
    """Scores over HTTP for one ScorerConfig.

    urls: in place of config.urls, for a scorer that the run serves itself. gives: the declaration if it is known, so
    that a table of a server that was never reached has the right columns. Use `await client.aclose()` at the end.
    """

    def __init__(
        self, config: ScorerConfig, *, urls: Sequence[str] | None = None, gives: ScorerGives | None = None
    ) -> None:
        self.config = config
        chosen = tuple(urls or config.urls)
        if not chosen:
            raise ConfigError(f"scorers.{config.name}.urls", "no reward server to ask", "start one and give its URL")
        for url in chosen:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"scorers.{config.name}.urls", f"{url!r} is not an http(s) URL")
        self.endpoints = [Endpoint(u, CircuitBreaker(config.breaker_failures, config.breaker_reset_s)) for u in chosen]
        self._gives = gives
        self._info: ScorerInfo | None = None
        self._info_stale = False
        self._slots = asyncio.Semaphore(config.concurrency)
        self._stats = ClientStats(config.name)
        self._persist = Persistence(
            self.endpoints, RetryBudget(config.retry_budget), self._stats, config.timeout_s, config.max_retries,
            refused=self._doubt_info,
        )  # fmt: skip
        self._http = httpx.AsyncClient(
            headers=headers_with_token(config.token_env), timeout=None, trust_env=False, follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )  # fmt: skip

    @property
    def reads(self) -> Literal["images", "latents"] | None:
        """What the scorer reads, None before it was first asked."""
        return None if self._info is None else self._info.accepts

    @property
    def stats(self) -> ClientStats:
        """A snapshot of the counters and of the circuits."""
        now = time.monotonic()
        return self._stats.copy({endpoint.url: endpoint.breaker.state(now) for endpoint in self.endpoints})

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> RewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def info(self, deadline_s: float | None = None, *, fresh: bool = False) -> ScorerInfo:
        """What the server says of itself; asked once, or again if `fresh`.

        Raises ScoringError when it cannot be had in time.
        """
        self._info_stale = self._info_stale or fresh
        wait_s = deadline_s or self.config.timeout_s
        try:
            async with asyncio.timeout(wait_s):
                return await self._ensure_info(time.monotonic() + wait_s, [])
        except AttemptFailed as error:
            raise ScoringError(f"scorer {self.config.name!r}: {error.reason}") from error
        except TimeoutError as error:
            urls = ", ".join(endpoint.url for endpoint in self.endpoints)
            raise ScoringError(f"scorer {self.config.name!r} at {urls} was not ready within {wait_s:g} s") from error

    async def score(
        self,
        images: Images,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        *,
        want_gradients: bool = False,
        deadline_s: float | None = None,
        latents: np.ndarray | None = None,
    ) -> ScoreTable:
        """The table of N images; never raises for a bad score.

        images: uint8 [N,H,W,3], a list of uint8 [H,W,3] of mixed sizes, or floating [N,C,h,w] for a scorer of latents;
        latents: floating [N,C,h,w], sent in place of the images to a scorer that reads latents;
        metadata: N entries or none; deadline_s: for all attempts together (default: the configuration's).
        With want_gradients the table's gradients are float32, shaped like the images, zero where the score is not OK.
        Raises ValueError when the arguments do not fit together.
        """
        whole = make_part(images, prompts, metadata)
        deadline = time.monotonic() + (deadline_s or self.config.deadline_s)
        try:
            info = await self._known_info(deadline)
            whole = self._readable(whole, info, latents)
            parts = self._cut(whole, info, want_gradients)
        except AttemptFailed as error:
            return self._stats.count(self._blank(whole, want_gradients, error.outcome, error.reason))
        tables = await asyncio.gather(*(self._part(part, info, want_gradients, deadline) for part in parts))
        try:
            table = join(tables)
        except PayloadError as error:
            table = self._blank(whole, want_gradients, Outcome.FAILED, str(error))
        return self._stats.count(table)

    def _readable(self, whole: Part, info: ScorerInfo, latents: np.ndarray | None) -> Part:
        """What the scorer reads of the images and the latents. Raises AttemptFailed when it was not given."""
        if info.accepts == "images" or not len(whole):
            return whole
        if latents is not None:
            return make_part(latents, whole.prompts, whole.metadata)
        if not isinstance(whole.inputs, np.ndarray) or whole.inputs.dtype == np.uint8:
            reason = f"scorer {self.config.name!r} reads latents and was given images"
            raise AttemptFailed("request", reason, retry="no")
        return whole

    def _cut(self, whole: Part, info: ScorerInfo, want_gradients: bool) -> list[Part]:
        """The requests of a call. Raises AttemptFailed when the scorer cannot do what is asked."""
        if want_gradients and not info.offers_gradients:
            raise AttemptFailed("gradients", f"scorer {self.config.name!r} offers no gradients", retry="no")
        if want_gradients and len(whole) and whole.shape is None:
            raise AttemptFailed("gradients", "gradients need images of one size", retry="no")
        if info.kind == "pair" or not len(whole):
            return [whole]
        if info.whole_group:
            return list(whole.groups())
        return list(whole.cut(min(self.config.max_batch, info.max_images), info.max_body_bytes - _HEADER_BYTES))

    async def _part(self, part: Part, info: ScorerInfo, want_gradients: bool, deadline: float) -> ScoreTable:
        """The table of one request, whatever happens, by the deadline."""
        if not len(part):
            return self._blank(part, want_gradients, Outcome.FAILED, "")
        history: list[AttemptFailed] = []
        try:
            async with _until(deadline), self._slots:
                expected = part.expected(info, want_gradients)
                return await self._persist.ask(lambda e, s: self._ask(e, s, part, expected), deadline, history)
        except AttemptFailed as error:
            return self._blank(part, want_gradients, error.outcome, error.reason)
        except TimeoutError:
            last = f"; last: {history[-1].reason}" if history else ""
            return self._blank(part, want_gradients, Outcome.TIMED_OUT, f"no score before the deadline{last}")

    async def _ask(self, endpoint: Endpoint, timeout_s: float, part: Part, expected: Expected) -> ScoreTable:
        try:
            request = ScoreRequest(
                request_id=uuid.uuid4().hex, prompts=part.prompts, metadata=part.metadata, version=self.config.version,
                want_gradients=expected.gradient_shape is not None, deadline_s=timeout_s,
            )  # fmt: skip
        except ValidationError as error:
            raise AttemptFailed("request", f"the request cannot be sent: {error}", retry="no", blames=False) from error
        table = await endpoint.score(self._http, request, part, expected, timeout_s)
        return replace(table, scorer=self.config.name)  # the name the jury knows it by

    async def _known_info(self, deadline: float) -> ScorerInfo:
        """The scorer's info. Raises AttemptFailed alone."""
        history: list[AttemptFailed] = []
        try:
            async with _until(deadline):
                return await self._ensure_info(deadline, history)
        except TimeoutError:
            last = f"; last: {history[-1].reason}" if history else ""
            raise AttemptFailed(
                "timeout", f"no server was ready before the deadline{last}", Outcome.TIMED_OUT
            ) from None

    def _doubt_info(self) -> None:
        self._info_stale = True  # what we know of the server may have become wrong

    async def _ensure_info(self, deadline: float, history: list[AttemptFailed]) -> ScorerInfo:
        if self._info is None or self._info_stale:
            self._info = await self._persist.ask(lambda e, s: e.info(self._http, s), deadline, history)
            self._info_stale = False
        return self._info

    def _blank(self, part: Part, want_gradients: bool, outcome: Outcome, reason: str) -> ScoreTable:
        kind, columns, version = "point", tuple(self.config.weights) or ("score",), ""
        if self._gives is not None:
            kind, columns = self._gives.kind, self._gives.columns
        if self._info is not None:
            kind, columns, version = self._info.kind, self._info.columns, self._info.version
        shape = part.shape if want_gradients else None
        expected = Expected(kind, columns, len(part), shape)  # type: ignore[arg-type]
        return blank_table(self.config.name, version, expected, outcome, reason)


def _until(deadline: float) -> asyncio.Timeout:
    """A timeout at a time.monotonic() instant."""
    return asyncio.timeout(max(0.0, deadline - time.monotonic()))


def headers_with_token(token_env: str) -> dict[str, str]:
    """What every request carries, with the bearer token of that variable where it is set."""
    token = os.environ.get(token_env)
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/vnd.salon.score"}
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})
