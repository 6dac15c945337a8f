"""Time as a process lives through it: whoever was stopped together with the others must not take them for hung.

A virtual machine is frozen, a scheduler stops a job (SIGSTOP) or puts it into the freezer: every process of a run
stands still, and when they go on all leases and limits seem to have run out at once. So each process that judges has a
thread that looks at the clock every TICK_S; a gap of more than GAP_S is time that the process itself has missed. That
time counts for no lease (`clock`), and a limit during which some was missed begins anew (`within`, `wait_all`).
A suspended computer needs none of it where its monotonic clock stands still too, as on Linux.

Invariant: a process that runs all the time judges as it would without this file; one that was stopped judges nobody
before it has run for a whole limit.
Does not own: the limits, and what becomes of those who outlive them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

TICK_S = 0.25
GAP_S = 2.0
"""Far more than a tick takes on a busy machine, less than any sensible limit."""


class Awake:
    """How much of its own time a process has missed. Every look counts as a tick, so a gap is known at once."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._last, self._missed = now(), 0.0

    def look(self) -> tuple[float, float]:
        """(now, seconds missed until now)."""
        with self._lock:
            now = self._now()
            if now - self._last > GAP_S:
                self._missed += now - self._last
            self._last = now
            return now, self._missed

    def tick_for_ever(self) -> None:
        while True:
            time.sleep(TICK_S)
            self.look()


_begin = threading.Lock()
_own: Awake | None = None


def _process() -> Awake:
    """Of this process; its thread starts with the first question."""
    global _own
    with _begin:
        if _own is None:
            _own = Awake()
            threading.Thread(target=_own.tick_for_ever, name="awake", daemon=True).start()
        return _own


def missed_s() -> float:
    """Seconds that this process has missed so far."""
    return _process().look()[1]


def clock() -> float:
    """Monotonic seconds without those that this process has missed."""
    now, missed = _process().look()
    return now - missed


async def wait_all(tasks: Iterable[asyncio.Future[Any]], limit_s: float) -> tuple[set[Any], set[Any]]:
    """(done, pending): when all are done, when one has failed, or after limit_s without a gap."""
    tasks = list(tasks)
    while True:
        missed = missed_s()
        done, pending = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        if not pending or any(task.cancelled() or task.exception() for task in done) or missed_s() == missed:
            return done, pending


async def within(work: Awaitable[T], limit_s: float) -> T:
    """The result. Raises TimeoutError after limit_s without a gap; the work is cancelled then, and has ended."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await wait_all([task], limit_s)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
