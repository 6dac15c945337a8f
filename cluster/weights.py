"""The weight store: published versions, offered to actors, which load them at their own group boundary.

Invariant: a version's arrays, digest and canary are published together, and an actor that says it holds a version has
proven it by the digest of its live tensors and by a canary output closer to this version than to the one before.
The arrays live in the object store, one copy a node, read without copying; this process holds references only. With
weights.transport `collective` every node has a reference of its own (host_copies.py).
Does not own: how tensors are exported and loaded (policy/weights.py), when to publish (learner_loop.py), who has taken
note of an offer (rollout_loop.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contracts.wire import WeightOffer


@dataclass(frozen=True)
class PublishedVersion:
    """One version: its offer and references to its arrays and canary outputs."""

    offer: WeightOffer
    arrays: Any  # ObjectRef of dict[str, np.ndarray], or the dict itself
    canary_current: np.ndarray
    canary_previous: np.ndarray | None
    published_at: float
    generation: int = 0  # rises when a roll-back makes an older version the newest again
    on_nodes: Mapping[str, Any] = field(default_factory=dict)  # ObjectRefs by node, where host copies hold the arrays


class WeightStore:
    """Keeps the latest version and tells every actor about it."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.latest: PublishedVersion | None = None
        self.generation = 0

    @property
    def version(self) -> int:
        return -1 if self.latest is None else self.latest.offer.version

    def add(
        self, offer: WeightOffer, arrays: Any, canary: np.ndarray, on_nodes: Mapping[str, Any] | None = None
    ) -> PublishedVersion:
        """Make `offer` the latest version. The previous version's arrays are released with their references.

        on_nodes: references of host copies by node; actors anywhere else are offered `arrays`.
        """
        previous = None
        if self.latest is not None:
            previous = self.latest.canary_current
            self.generation += offer.version <= self.latest.offer.version
        self.latest = PublishedVersion(
            offer, arrays, canary, previous, time.time(), self.generation, dict(on_nodes or {})
        )
        return self.latest

    def offer_to(self, actor: Any, node: str) -> Any:
        """Hand the latest version to one actor on `node`; returns the reference of its acknowledgement."""
        latest = self.latest
        assert latest is not None, "offer_to before the first publication"
        arrays = latest.on_nodes.get(node, latest.arrays)
        return actor.offer.remote(
            latest.generation, latest.offer, arrays, latest.canary_current, latest.canary_previous
        )
