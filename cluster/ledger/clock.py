"""Time for leases: wall-clock seconds that no jump of the system clock can move while the process lives.

Deadlines are stored as wall time so that a human can read them. Reopening a ledger takes every lease back
(`Ledger.recover`), so a clock that jumped between two processes cannot expire or prolong one either.
"""

from __future__ import annotations

import time


class SteadyClock:
    """Seconds since the epoch at construction, advanced by the monotonic clock."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()
