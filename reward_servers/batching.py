"""Dynamic batching: images of many requests in one call of the scorer.

Invariant: at most `capacity` images wait; every accepted piece of work ends with a table or is dropped because nobody
waits for it any more. The scorer runs in one thread of its own, so the event loop stays free to answer probes. While it
scores, the next batch is handed to that thread as soon as it is full, so that the thread need not wait for the loop.
Does not own: HTTP (app), what happens within a call (isolation).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from contracts.scores import ScoreTable
from reward_servers.client.tables import take
from reward_servers.isolation import score_isolated
from reward_servers.scorers.base import ScoreBatch, Scorer

_CALLS = 2
"""That the scorer's thread is given: the present one and the next."""


class QueueFull(Exception):
    """retry_after_s: when a place is likely to be free."""

    def __init__(self, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__("the queue is full")


@dataclass(eq=False)
class Work:
    """Images of one size from one request. deadline: by time.monotonic(), after which nobody waits."""

    batch: ScoreBatch
    deadline: float
    arrived: float
    result: asyncio.Future[ScoreTable] = field(repr=False)

    @property
    def key(self) -> tuple[object, ...]:
        """What may be joined: equal shapes, types and wishes."""
        inputs = self.batch.inputs
        return (inputs.shape[1:], inputs.dtype, self.batch.latents is None, self.batch.want_gradients)

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.result.done() and self.deadline > time.monotonic()


class Batcher:
    """A bounded queue in front of one scorer.

    joins: whether images of several requests may share a call (scorers of whole groups compare within one request).
    on_batch(num_images, seconds): told after each call, in the scorer's thread.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_batch: int,
        max_wait_s: float,
        capacity: int,
        on_batch: Callable[[int, float], None],
    ) -> None:
        self._scorer, self._max_batch, self._max_wait_s, self.capacity = scorer, max_batch, max_wait_s, capacity
        self._joins = not scorer.declares.needs_group
        self._on_batch = on_batch
        self._queue: deque[Work] = deque()
        self._calls: deque[list[Work]] = deque()
        """What the thread was given: the works it scores, and those of its next call."""
        self._change = asyncio.Event()
        self._thread = ThreadPoolExecutor(_CALLS if scorer.overlaps else 1, thread_name_prefix="scorer")
        self._seconds_per_image = 0.0
        self._starts: deque[float] = deque()
        self._last_end = 0.0
        self.draining = False

    @property
    def depth(self) -> int:
        """Images waiting that somebody still waits for."""
        following = [work for works in list(self._calls)[1:] for work in works]
        return sum(len(work.batch) for work in (*self._queue, *following) if not work.result.done())

    @property
    def held(self) -> int:
        """Images waiting or being scored: what autoscaling counts, as it does not fall while the scorer works."""
        return self.depth + sum(len(work.batch) for work in (self._calls[0] if self._calls else ()))

    @property
    def idle(self) -> bool:
        return not self._queue and not self._calls

    @property
    def busy_seconds(self) -> float:
        """How long the present call of the scorer has been running."""
        starts = list(self._starts)
        return time.monotonic() - max(starts[0], self._last_end) if starts else 0.0

    def retry_after_s(self) -> float:
        """Seconds until about half of the queue is served, 1 to 30."""
        return float(np.clip(self._seconds_per_image * self.depth / 2, 1.0, 30.0))

    def submit(self, batches: Sequence[ScoreBatch], deadline: float) -> list[asyncio.Future[ScoreTable]]:
        """One future a batch, all accepted or none. Raises QueueFull. Cancel a future to take the work back."""
        self._drop_abandoned()  # before counting: callers who hang up during a long call must not fill the queue
        if self.depth + sum(map(len, batches)) > self.capacity:
            raise QueueFull(self.retry_after_s())
        loop = asyncio.get_running_loop()
        works = [Work(batch, deadline, time.monotonic(), loop.create_future()) for batch in batches]
        self._queue.extend(works)
        self._change.set()
        return [work.result for work in works]

    async def call(self, function: Callable[[], ScoreTable | None]) -> ScoreTable | None:
        """Run something in the scorer's thread (loading, the canary, taking up a version)."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        async with asyncio.TaskGroup() as calls:
            while True:
                works = await self._gather()
                self._calls.append(works)
                calls.create_task(self._score(works))

    async def drain(self, seconds: float) -> bool:
        """Wait until all accepted work is done; False when it takes longer."""
        self.draining = True
        self._change.set()
        deadline = time.monotonic() + seconds
        while not self.idle and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return self.idle

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> list[Work]:
        """The works of the next call: the oldest, and those that may join it, waiting a little for company."""
        while True:
            self._drop_abandoned()
            if (wait := self._seconds_to_wait()) == 0:
                return self._take()
            self._change.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), wait)

    def _seconds_to_wait(self) -> float | None:
        """Until the next call can be made up. 0: now; None: not before something changes."""
        if not self._queue or len(self._calls) == _CALLS:
            return None
        if not self._joins or self._full_enough() >= self._max_batch:
            return 0
        if self._calls:  # the thread is busy: what comes meanwhile may still join
            return None
        return 0 if self.draining else max(0.0, self._queue[0].arrived + self._max_wait_s - time.monotonic())

    def _full_enough(self) -> int:
        """Images that may share the next call."""
        return sum(len(work.batch) for work in self._queue if work.key == self._queue[0].key)

    def _take(self) -> list[Work]:
        chosen = [self._queue.popleft()]
        if not self._joins:
            return chosen
        room = self._max_batch - len(chosen[0].batch)
        for work in list(self._queue):
            if work.key == chosen[0].key and len(work.batch) <= room:
                chosen.append(work)
                self._queue.remove(work)
                room -= len(work.batch)
        return chosen

    def _drop_abandoned(self) -> None:
        """Work whose caller has gone or whose deadline has passed costs the scorer nothing."""
        for work in [work for work in self._queue if not work.wanted]:
            self._queue.remove(work)
            _expire(work)

    async def _score(self, works: list[Work]) -> None:
        try:
            live, table = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, works)
            if table is not None:
                _hand_out(live, table)
            for work in works:
                _expire(work)
        except Exception as error:  # a defect of this server, not of the scorer: its callers get 500, the rest goes on
            for work in works:
                if not work.result.done():
                    work.result.set_exception(error)
        finally:
            self._calls.remove(works)
            self._change.set()

    def _call(self, works: list[Work]) -> tuple[list[Work], ScoreTable | None]:
        """In the scorer's thread: those of the works that are still wanted, and their table."""
        live = [work for work in works if work.wanted]
        if not live:
            return live, None
        num_images = sum(len(work.batch) for work in live)
        start = time.monotonic()
        self._starts.append(start)
        try:
            return live, self._fresh_table(_joined([work.batch for work in live]))
        finally:
            self._starts.remove(start)
            end = time.monotonic()
            seconds, self._last_end = end - max(start, self._last_end), end  # of overlapping calls, the second's own
            self._seconds_per_image = 0.7 * self._seconds_per_image + 0.3 * seconds / num_images
            self._on_batch(num_images, seconds)

    def _fresh_table(self, batch: ScoreBatch) -> ScoreTable:
        """Between two batches, and never within one, a scorer takes up weights that changed."""
        if self._scorer.follows:
            self._scorer.refresh()
        return score_isolated(self._scorer, batch)


def _joined(batches: list[ScoreBatch]) -> ScoreBatch:
    if len(batches) == 1:
        return batches[0]
    latents = [batch.latents for batch in batches if batch.latents is not None]
    return ScoreBatch(
        np.concatenate([batch.images for batch in batches]),
        tuple(prompt for batch in batches for prompt in batch.prompts),
        tuple(meta for batch in batches for meta in batch.metadata),
        np.concatenate(latents) if latents else None,
        batches[0].want_gradients,
    )


def _expire(work: Work) -> None:
    """Tell whoever still waits that it is too late."""
    if not work.result.done():
        work.result.set_exception(TimeoutError("the deadline passed in the queue"))


def _hand_out(works: list[Work], table: ScoreTable) -> None:
    start = 0
    for work in works:
        part = table if len(works) == 1 else take(table, slice(start, start + len(work.batch)))
        start += len(work.batch)
        if not work.result.done():
            work.result.set_result(part)
