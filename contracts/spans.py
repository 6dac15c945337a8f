"""When work began and how long it took, for the trace of a run.

Owns the clock that processes put into spans, and their collection. Does not own: the message (wire.py), what becomes of
spans (cluster/telemetry/trace.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from contracts.wire import Span

_OFFSET = time.time() - time.perf_counter()


def wall_clock() -> float:
    """Seconds since the epoch as this process saw them at its start, advanced steadily: no jump of the clock moves it.

    Clocks of several machines differ by what their time service leaves, milliseconds as a rule.
    """
    return _OFFSET + time.perf_counter()


class SpanLog:
    """Collects the spans of one lane.

    Example: `log = SpanLog("actor-0")`, then `with log.span("paint"): ...`, then `log.spans`.
    """

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.spans: tuple[Span, ...] = ()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The block as one span, also when it raises."""
        start = wall_clock()
        try:
            yield
        finally:
            self.spans += (Span(lane=self.lane, name=name, start=start, seconds=wall_clock() - start),)

    def end_to_end(self, start: float, seconds: dict[str, float]) -> None:
        """Sums of interleaved phases as spans laid end to end from `start`, in their order; empty ones are left out."""
        for name, took in seconds.items():
            if took > 0:
                self.spans += (Span(lane=self.lane, name=name, start=start, seconds=took),)
                start += took
