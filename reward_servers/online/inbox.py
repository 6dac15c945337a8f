"""The bounded queue in front of a trainer: newest first, and whoever puts never waits.

Invariant: at most `capacity` items wait; when one more comes the oldest is dropped and counted (ONI, appo/learner.py).
Does not own: what is queued, threads that take (loop.py).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class FedGroup:
    """A copy of a group. images: uint8 [G,H,W,3] of one prompt, painted by policy version `weight_version`."""

    group_id: int
    prompt: str
    images: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    weight_version: int = 0


class Inbox(Generic[T]):
    """Thread-safe. offered, dropped: counts since the start."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._arrival = threading.Condition()
        self._closed = False
        self.offered = self.dropped = 0

    def put(self, item: T) -> None:
        """Add an item at once, dropping the oldest when it is full."""
        with self._arrival:
            self.offered += 1
            if len(self._items) >= self._capacity:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._arrival.notify()

    def take(self, timeout_s: float) -> T | None:
        """The newest item, waiting for one; None when none comes in time or the inbox is closed."""
        with self._arrival:
            if not self._arrival.wait_for(lambda: self._items or self._closed, timeout_s) or not self._items:
                return None
            return self._items.pop()

    def close(self) -> None:
        """Let everybody who waits go; what waits is left."""
        with self._arrival:
            self._closed = True
            self._arrival.notify_all()

    def __len__(self) -> int:
        return len(self._items)
