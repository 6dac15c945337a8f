"""Judge: one model behind one or several servers, asked with patience and at a bounded cost.

Every question ends within its deadline in a Reply, or raises AttemptFailed, which carries the outcome (FAILED or
TIMED_OUT). On the way: cache, concurrency limit a server, retry budget, circuit breaker a server, a hedged second
request when the first is slow. A Judge lives in one event loop.
Does not own: one exchange (endpoint), retries and hedging (client.persist), the meaning of an answer (reading).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, replace

import httpx

from contracts.config.judges import JudgeOptions
from contracts.scores import Outcome
from reward_servers.client.breaker import CircuitBreaker, RetryBudget
from reward_servers.client.endpoint import AttemptFailed
from reward_servers.client.persist import Persistence
from reward_servers.judging.endpoint import JudgeEndpoint
from reward_servers.judging.question import Question, Reply
from reward_servers.scorers.base import Meter, no_meter

_LATENCIES = 256
_ENOUGH_LATENCIES = 20


@dataclass
class JudgeStats:
    """Totals of one Judge. requests: retries and hedges included; failures: by cause; dollars: by configured prices."""

    requests: int = 0
    retries: int = 0
    hedges: int = 0
    cache_hits: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    dollars: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)


class Judge:
    """Asks the servers of one model. Use `await judge.aclose()` at the end, or `async with`."""

    def __init__(self, options: JudgeOptions, meter: Meter = no_meter, token: str | None = None) -> None:
        """token: the API key; default: from options.token_env."""
        self.options, self.meter, self.stats = options, meter, JudgeStats()
        self._told = JudgeStats()
        self.endpoints = [
            JudgeEndpoint(
                url, CircuitBreaker(options.breaker_failures, options.breaker_reset_s), options.model,
                options.concurrency, options.log_probs,
            )
            for url in options.urls
        ]  # fmt: skip
        self._cache: OrderedDict[str, Reply] = OrderedDict()
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._persist = Persistence(
            self.endpoints, RetryBudget(options.retry_budget), self.stats, options.timeout_s, options.max_retries,
            hedge_after_s=self._hedge_after_s, hedged=self._count_hedge,
        )  # fmt: skip
        # Questions beyond what all servers may have in flight wait here in order, instead of looking again and again.
        self._slots = asyncio.Semaphore(options.concurrency * len(options.urls))
        self._http = httpx.AsyncClient(
            headers=_headers(token or os.environ.get(options.token_env)), timeout=None, trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=options.concurrency),
        )  # fmt: skip

    async def ask(self, question: Question) -> Reply:
        """The reply to a question, from the cache or a server, within the deadline. Raises AttemptFailed."""
        key = question.key(self.options.model) if self.options.cache_entries else ""
        if key in self._cache:
            self._cache.move_to_end(key)
            self.stats.cache_hits += 1
            self._tell()
            return self._cache[key]
        start = time.monotonic()
        try:
            reply = await self._ask(question, start + self.options.deadline_s)
        finally:
            self.meter("salon_judge_answer_seconds", time.monotonic() - start)
            self._tell()
        if key:
            self._cache[key] = reply
            while len(self._cache) > self.options.cache_entries:
                self._cache.popitem(last=False)
        return reply

    async def check(self, deadline_s: float) -> None:
        """Each server answers and has the model. Raises AttemptFailed or ConfigError."""
        for endpoint in self.endpoints:
            await endpoint.check_model(self._http, deadline_s)

    def away(self) -> str | None:
        """Why nobody can be asked now, or None: every circuit is open (half-open ones are worth a question)."""
        now = time.monotonic()
        if all(endpoint.breaker.state(now) == "open" for endpoint in self.endpoints):
            return f"the judge at {', '.join(self.options.urls)} is away"
        return None

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Judge:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _ask(self, question: Question, deadline: float) -> Reply:
        history: list[AttemptFailed] = []
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._slots:
                return await self._persist.ask(lambda e, s: self._exchange(e, question, s), deadline, history)
        except TimeoutError:
            last = f"; last: {history[-1].reason}" if history else ""
            reason = f"no answer within {self.options.deadline_s:g} s{last}"
            raise AttemptFailed("timeout", reason, Outcome.TIMED_OUT, "no") from None

    async def _exchange(self, endpoint: JudgeEndpoint, question: Question, timeout_s: float) -> Reply:
        start = time.monotonic()
        reply = await endpoint.chat(self._http, question, timeout_s)
        self._latencies.append(time.monotonic() - start)
        self.stats.tokens_read += reply.tokens_read
        self.stats.tokens_written += reply.tokens_written
        self.stats.dollars += (
            reply.tokens_read * self.options.dollars_per_million_read
            + reply.tokens_written * self.options.dollars_per_million_written
        ) / 1e6
        return reply

    def _hedge_after_s(self) -> float | None:
        """A quantile of the latest latencies, once there are enough of them to know one."""
        quantile = self.options.hedge_quantile
        if quantile is None or len(self._latencies) < _ENOUGH_LATENCIES:
            return None
        ordered = sorted(self._latencies)
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]

    def _count_hedge(self) -> None:
        self.stats.hedges += 1

    def _tell(self) -> None:
        """Hands what the totals gained since the last time to the meter."""
        new, old = self.stats, self._told
        gains: list[tuple[str, float, dict[str, str]]] = [
            ("requests_total", new.requests - old.requests, {}),
            ("retries_total", new.retries - old.retries, {}),
            ("hedges_total", new.hedges - old.hedges, {}),
            ("cache_hits_total", new.cache_hits - old.cache_hits, {}),
            ("tokens_total", new.tokens_read - old.tokens_read, {"direction": "read"}),
            ("tokens_total", new.tokens_written - old.tokens_written, {"direction": "written"}),
            ("cost_dollars_total", new.dollars - old.dollars, {}),
        ]
        gains += [
            ("request_failures_total", n - old.failures[cause], {"cause": cause}) for cause, n in new.failures.items()
        ]
        for name, gain, labels in gains:
            if gain > 0:
                self.meter(f"salon_judge_{name}", gain, **labels)
        self._told = replace(new, failures=Counter(new.failures))


def _headers(token: str | None) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})
