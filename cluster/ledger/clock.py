"""Time for leases: wall-clock seconds that no jump of the system clock can move while the process lives, and that
stand still while the process itself is stopped (awake.py): nobody could have kept a lease then.

Deadlines are stored as wall time so that a human can read them. Reopening a ledger takes every lease back
(`Ledger.recover`), so a clock that jumped between two processes cannot expire or prolong one either.
"""

from __future__ import annotations

import time

from cluster import awake


class SteadyClock:
    """Seconds since the epoch at construction, advanced by the monotonic clock without what this process missed."""

    def __init__(self) -> None:
        self._offset = time.time() - awake.clock()

    def __call__(self) -> float:
        return self._offset + awake.clock()
