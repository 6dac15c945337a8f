"""Circuit breaker of one URL and the retry budget of one client: what keeps a sick server from being hammered.

Invariant: while a circuit is open nothing is sent; half-open lets one probe through at a time.
Does not own: sending (endpoint), waiting (client). Time is passed in, so the states can be tested without sleeping.
"""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half_open"]


FIRST_PAUSE = 1 / 8
"""Of reset_s. A killed server is back within a second, and its callers should be as well."""


class CircuitBreaker:
    """Opens after `failures` in a row, then admits one probe that decides.

    It first stays open for an eighth of `reset_s` seconds, after each failed probe for twice as long as before, at
    most `reset_s`.
    """

    def __init__(self, failures: int, reset_s: float) -> None:
        self._limit, self._reset_s = failures, reset_s
        self._pause_s = reset_s * FIRST_PAUSE
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._probing = False

    def state(self, now: float) -> State:
        if self._opened_at is None:
            return "closed"
        return "half_open" if now >= self._opened_at + self._pause_s else "open"

    def wait_s(self, now: float) -> float:
        """Seconds until a request may be sent: 0 for now; while a probe is out, until it may have decided."""
        state = self.state(now)
        if state == "closed" or (state == "half_open" and not self._probing):
            return 0.0
        if state == "half_open":
            return 0.05
        assert self._opened_at is not None
        return self._opened_at + self._pause_s - now

    def enter(self, now: float) -> None:
        """A request is about to be sent (only when wait_s is 0)."""
        self._probing = self.state(now) == "half_open"

    def succeeded(self) -> None:
        self._in_a_row, self._opened_at, self._probing = 0, None, False

    def failed(self, now: float) -> None:
        self._in_a_row += 1
        if self._opened_at is None:
            if self._in_a_row >= self._limit:
                self._opened_at, self._pause_s = now, self._reset_s * FIRST_PAUSE
        elif self._probing:
            self._opened_at, self._pause_s = now, min(2 * self._pause_s, self._reset_s)
        self._probing = False

    def released(self) -> None:
        """The request ended without saying anything about the server (cancelled, or refused for what it held)."""
        self._probing = False


class RetryBudget:
    """Retries as a share of requests plus 10: an outage may not multiply the load.

    A bucket that starts with 10, gains `share` a request and holds at most what 100 requests earn above 10, so that a
    long healthy run does not save up for a storm.
    """

    FREE = 10.0

    def __init__(self, share: float) -> None:
        self._share, self._left = share, self.FREE

    def earn(self) -> None:
        """A first attempt was made."""
        self._left = min(self._left + self._share, self.FREE + 100 * self._share)

    def take(self) -> bool:
        """Whether one more retry is allowed; it counts."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
