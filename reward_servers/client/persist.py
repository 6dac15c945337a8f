"""Asking until it works: replicas, retries, back-off, circuits, hedging, all within one deadline.

Shared by the client of reward servers and the client of judges. Invariant: a costly retry and a hedged request are
both taken from one budget, so an outage cannot multiply the load.
Does not own: one exchange and what its failure means (endpoint.AttemptFailed), circuit and budget (breaker).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from reward_servers.client.breaker import RetryBudget
from reward_servers.client.endpoint import AttemptFailed, Endpoint

T = TypeVar("T")
E = TypeVar("E", bound=Endpoint)

_BACK_OFF = wait_random_exponential(multiplier=0.1, max=5.0)  # "full jitter": uniform in [0, 0.1 * 2^n]


class Counts(Protocol):
    """What is counted; ClientStats and JudgeStats have these fields."""

    requests: int
    retries: int
    failures: Any  # Counter[str], by cause


@dataclass
class Persistence(Generic[E]):
    """Asks `endpoints` on behalf of one client.

    timeout_s: one request; max_retries: costly ones of one question; refused: told when the answer was "not here";
    hedge_after_s: seconds after which a second request is sent to another endpoint beside the first, None for never;
    hedged: told then. A lone endpoint is never asked twice at once: it would only have more to do.
    """

    endpoints: Sequence[E]
    budget: RetryBudget
    counts: Counts
    timeout_s: float
    max_retries: int
    refused: Callable[[], None] = lambda: None
    hedge_after_s: Callable[[], float | None] = lambda: None
    hedged: Callable[[], None] = lambda: None
    _turn: int = 0

    async def ask(
        self,
        ask: Callable[[E, float], Awaitable[T]],
        deadline: float,
        history: list[AttemptFailed],
    ) -> T:
        """Asks until it works, is refused for good, or costs too much. Raises the last AttemptFailed.

        history: every failed attempt is appended, for the caller that is cut off by its deadline.
        """
        self.budget.earn()
        tried: list[E] = []

        def worth_it(error: BaseException) -> bool:
            if not isinstance(error, AttemptFailed):
                return False
            history.append(error)
            self.counts.failures[error.cause] += 1
            return self._worth_it(error, history, tried)

        def count(_: RetryCallState) -> None:
            self.counts.retries += 1

        async def once() -> T:
            return await self._hedged(ask, deadline, tried)

        retrying = AsyncRetrying(retry=retry_if_exception(worth_it), wait=_wait_s, before_sleep=count, reraise=True)
        return await retrying(once)

    def _worth_it(self, error: AttemptFailed, history: list[AttemptFailed], tried: list[E]) -> bool:
        """Whether to try again after `error`, the last of history; a costly retry is taken from the budget."""
        if error.retry == "wait":
            return True
        if error.retry == "yes":
            if sum(earlier.retry == "yes" for earlier in history) > self.max_retries:
                return False
            if self.budget.take():
                return True
            error.reason += " (retry budget spent)"
            return False
        self.refused()
        return error.retry == "elsewhere" and len(set(tried)) < len(self.endpoints)

    async def _hedged(self, ask: Callable[[E, float], Awaitable[T]], deadline: float, tried: list[E]) -> T:
        """One attempt; when it is slow another endpoint is asked beside it, and the first to succeed is the answer."""
        first = await self._pick(tried)
        tried.append(first)
        wait_s = self.hedge_after_s() if len(self.endpoints) > 1 else None
        if wait_s is None:
            return await self._guarded(first, ask, deadline)
        tasks = [asyncio.create_task(self._guarded(first, ask, deadline))]
        try:
            await asyncio.wait(tasks, timeout=wait_s)
            second = None if tasks[0].done() else self._free(tried, besides=first)
            if second is not None and self.budget.take():
                tried.append(_entered(second))
                self.hedged()
                tasks.append(asyncio.create_task(self._guarded(second, ask, deadline)))
            return await _first_to_succeed(tasks)
        finally:
            if not all(task.done() for task in tasks):
                await asyncio.sleep(0)  # a task cancelled before it began would keep its place at the endpoint
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pick(self, tried: Sequence[E]) -> E:
        """The healthy replica that this request tried least and that has the least to do.

        Waits while all circuits are open or all servers asked to be left alone.
        """
        while True:
            chosen = self._free(tried)
            if chosen is not None:
                return _entered(chosen)
            now = time.monotonic()
            await asyncio.sleep(max(0.005, min(endpoint.wait_s(now) for endpoint in self.endpoints)))

    def _free(self, tried: Sequence[E], besides: E | None = None) -> E | None:
        """Who may be asked now, `besides` and its other names left out; None when nobody may."""
        now = time.monotonic()
        self._turn += 1
        order = [self.endpoints[(self._turn + i) % len(self.endpoints)] for i in range(len(self.endpoints))]
        free = [
            endpoint for endpoint in order
            if endpoint.wait_s(now) == 0 and (besides is None or endpoint.url != besides.url)
        ]  # fmt: skip
        return min(free, key=lambda endpoint: (tried.count(endpoint), endpoint.in_flight), default=None)

    async def _guarded(self, endpoint: E, ask: Callable[[E, float], Awaitable[T]], deadline: float) -> T:
        """One attempt at an endpoint that was picked for it, reported to the circuit breaker however it ends."""
        self.counts.requests += 1
        timeout_s = max(0.001, min(self.timeout_s, deadline - time.monotonic()))
        try:
            result = await ask(endpoint, timeout_s)
        except AttemptFailed as error:
            if error.blames:
                endpoint.breaker.failed(time.monotonic())
            else:
                endpoint.breaker.released()
            raise
        except BaseException:  # cancelled: by the deadline, which the server missed, or by our caller
            if time.monotonic() >= deadline - 0.05:
                endpoint.breaker.failed(time.monotonic())
            else:
                endpoint.breaker.released()
            raise
        finally:
            endpoint.in_flight -= 1
        endpoint.breaker.succeeded()
        return result


def _entered(endpoint: E) -> E:
    """It, with a place taken at once, so that whoever picks next sees it; `_guarded` gives the place back."""
    endpoint.breaker.enter(time.monotonic())
    endpoint.in_flight += 1
    return endpoint


async def _first_to_succeed(tasks: Sequence[asyncio.Task[T]]) -> T:
    """The first result; when all fail, the first task's error."""
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled() and task.exception() is None:
                return task.result()
    return tasks[0].result()


def _wait_s(state: RetryCallState) -> float:
    """Back-off with jitter; a server that named a time is left alone by _pick, so only the jitter is added."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, AttemptFailed) and error.retry_after_s > 0:
        return 0.0 if state.attempt_number == 1 else _BACK_OFF(state) * 0.1
    return _BACK_OFF(state)
