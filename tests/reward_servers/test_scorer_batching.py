"""The queue before a scorer: when the next call is handed over, and what may still join it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import numpy as np
from reward_helpers import MeanScorer, mean_and_first, pictures

from contracts.scores import ScoreTable
from reward_servers.batching import Batcher
from reward_servers.scorers.base import ScoreBatch


class Gated(MeanScorer):
    """Its call number n begins, and waits until the n-th gate opens."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.began = [threading.Event() for _ in range(calls)]
        self.gates = [threading.Event() for _ in range(calls)]

    def score(self, batch: ScoreBatch) -> ScoreTable:
        number = len(self.batch_sizes)
        self.began[number].set()
        assert self.gates[number].wait(30)
        return super().score(batch)


@asynccontextmanager
async def running(scorer: MeanScorer, max_batch: int, max_wait_s: float = 0.0) -> AsyncIterator[Batcher]:
    batcher = Batcher(
        scorer, max_batch=max_batch, max_wait_s=max_wait_s, capacity=100, on_batch=lambda images, seconds: None
    )
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        batcher.close()


def batch_of(images: np.ndarray) -> ScoreBatch:
    return ScoreBatch(images, ("",) * len(images), ({},) * len(images))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


def far() -> float:
    return time.monotonic() + 60


def test_a_full_batch_does_not_wait_for_the_event_loop() -> None:
    scorer, images = Gated(3), pictures(6)

    async def ask() -> None:
        async with running(scorer, max_batch=2) as batcher:
            futures = batcher.submit([batch_of(images[start : start + 2]) for start in (0, 2, 4)], far())
            await until(lambda: scorer.began[0].is_set() and batcher.depth == 4)
            for gate in scorer.gates:
                gate.set()
            assert scorer.began[1].wait(10), "the loop, which stands still here, was to hand it over"
            found = np.concatenate([table.values for table in await asyncio.gather(*futures)])
            np.testing.assert_array_equal(found, mean_and_first(images))
            await until(lambda: batcher.idle)

    asyncio.run(ask())
    assert scorer.batch_sizes == [2, 2, 2]


def test_a_batch_that_is_not_full_is_kept_open_while_the_scorer_is_busy() -> None:
    scorer, images = Gated(3), pictures(6)

    async def ask() -> None:
        async with running(scorer, max_batch=4) as batcher:
            first = batcher.submit([batch_of(images[:1])], far())
            await until(scorer.began[0].is_set)
            second = batcher.submit([batch_of(images[1:3])], far())
            await asyncio.sleep(0.05)  # a batch of two could have been handed over by now
            third = batcher.submit([batch_of(images[3:5])], far())
            last = batcher.submit([batch_of(images[5:])], far())
            await until(lambda: batcher.depth == 5)
            for gate in scorer.gates:
                gate.set()
            tables = await asyncio.gather(*first, *second, *third, *last)
            np.testing.assert_array_equal(np.concatenate([t.values for t in tables]), mean_and_first(images))

    asyncio.run(ask())
    assert scorer.batch_sizes == [1, 4, 1]


def test_work_that_was_handed_over_and_is_taken_back_is_not_scored_and_does_not_count_as_waiting() -> None:
    scorer, images = Gated(3), pictures(6)

    async def ask() -> None:
        async with running(scorer, max_batch=2) as batcher:
            futures = batcher.submit([batch_of(images[:2]), batch_of(images[2:4]), batch_of(images[4:5])], far())
            late = batcher.submit([batch_of(images[5:])], time.monotonic() + 0.1)
            await until(lambda: scorer.began[0].is_set() and batcher.depth == 4)
            futures[1].cancel()
            assert batcher.depth == 2
            assert batcher.held == 4
            await asyncio.sleep(0.1)
            for gate in scorer.gates:
                gate.set()
            await asyncio.gather(futures[0], futures[2])
            with suppress(TimeoutError):
                await late[0]
                raise AssertionError("its deadline had passed")
            await until(lambda: batcher.idle)

    asyncio.run(ask())
    assert scorer.batch_sizes == [2, 1]
