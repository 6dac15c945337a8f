"""A sink on a thread of its own: one that raises, or never answers, costs its rows and nothing else.

Invariant: no call here but `join` waits for a sink. What it cannot take is dropped and counted; a spell of losses is
told once when it begins and once when it is over. A sink is made in its thread and used there alone: MLflow's runs
belong to the thread that began them.
Does not own: what a sink does with a row (sinks.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from cluster.telemetry.sinks import Sink

QUEUED = 32
"""Rows and pictures that a sink may have before it: it may be slow for as many steps."""

RETRY_S = 30.0
"""Seconds between two attempts to make a sink: a tracker's server may be away."""

log = logging.getLogger("salon.telemetry")

Job = Callable[[Sink], None]


class SinkThread:
    """One sink and its thread. Safe to call from several threads."""

    def __init__(
        self, name: str, make: Callable[[], Sink], count_lost: Callable[[int], None], tell: Callable[..., None],
        queued: int = QUEUED, retry_s: float = RETRY_S,
    ) -> None:  # fmt: skip
        """count_lost: is given the number of rows and pictures lost; tell: takes an event's kind and fields."""
        self.name, self._make, self._count_lost, self._tell = name, make, count_lost, tell
        self._queued, self._retry_s, self._retry_at = queued, retry_s, 0.0
        self._sink: Sink | None = None
        self._jobs: deque[Job] = deque()  # the first one is under way
        self._changed = threading.Condition()
        self._ending = False
        self._lost = 0  # in the present spell
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        """The row of a step; it must not change afterwards."""
        self._hand_over(lambda sink: sink.scalars(row, step))

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture, uint8 [H,W,3]; it must not change afterwards."""
        self._hand_over(lambda sink: sink.image(tag, image, step))

    @property
    def waiting(self) -> int:
        """Rows and pictures that the sink has not taken yet, the one under way included."""
        return len(self._jobs)

    def end(self) -> None:
        """Take nothing more, and end the sink after what is waiting; returns at once."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for the end until time.monotonic() is `deadline`; what the sink has not taken by then is lost."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            with self._changed:
                left = len(self._jobs)
                self._jobs.clear()
            self._lose("it did not end in time", left)

    def _hand_over(self, job: Job) -> None:
        with self._changed:
            if self._ending:
                return
            full = len(self._jobs) >= self._queued
            if not full:
                self._jobs.append(job)
                self._changed.notify()
        if full:
            self._lose(f"{self._queued} rows wait for it already")

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._do(job)
            with self._changed:
                if self._jobs:  # `join` may have given up on them
                    self._jobs.popleft()
        try:
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            log.warning("%s did not end properly: %s", self.name, error)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ending)
            return self._jobs[0] if self._jobs else None

    def _do(self, job: Job) -> None:
        try:
            job(self._made())
        except Exception as error:  # each tracker raises errors of its own
            self._lose(f"{type(error).__name__}: {error}")
        else:
            self._works()

    def _made(self) -> Sink:
        if self._sink is None:
            if time.monotonic() < self._retry_at:
                raise ConnectionError("it could not be started, and is tried again in a while")
            self._retry_at = time.monotonic() + self._retry_s
            self._sink = self._make()
        return self._sink

    def _lose(self, why: str, number: int = 1) -> None:
        with self._changed:
            begins, self._lost = self._lost == 0, self._lost + number
        self._count_lost(number)
        if begins:
            log.warning("%s loses rows: %s", self.name, why)
            self._tell("sink_loses_rows", sink=self.name, error=why[:300])

    def _works(self) -> None:
        """The sink took a row. While others wait for it, more may be lost soon: the spell is not over."""
        with self._changed:
            if not self._lost or len(self._jobs) > 1:
                return
            lost, self._lost = self._lost, 0
        self._tell("sink_writes_again", sink=self.name, lost=lost)
