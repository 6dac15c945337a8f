"""What an online trainer is: it loads, learns from a group at a time, and packs its weights and state.

Invariant: a trainer's random numbers follow from seed and number of updates, so what it packs is all there is of it.
Does not own: threads, versions' numbers and when they are made (loop.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from reward_servers.online.inbox import FedGroup

Arrays = dict[str, np.ndarray]
Metrics = dict[str, float]


class OnlineTrainer(ABC):
    """One reward model. `learn` is called from one thread at a time, `label` from several."""

    labels_first: ClassVar[bool] = False
    """Groups pass through `label`, which may take long, before they are learnt from."""

    def __init__(self, config: Any, options: Mapping[str, Any], seed: int) -> None:
        """config: its section of contracts.config.online; options: those of the scorer that serves its versions."""
        self.config, self.seed = config, seed
        self.updates = 0

    @abstractmethod
    def load(self) -> None:
        """Load frozen networks and make the weights of update 0. Raises ConfigError."""

    @abstractmethod
    def restore(self, weights: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `pack` gave. Raises KeyError or ValueError for tensors of another model."""

    @abstractmethod
    def learn(self, item: Any) -> Metrics | None:
        """One update from a group, or from what `label` made of it; None when there is nothing in it to learn from."""

    @abstractmethod
    def pack(self) -> tuple[Arrays, Arrays, dict[str, Any]]:
        """(weights for scorers, state for a trainer that goes on, facts as JSON values)."""

    def label(self, group: FedGroup) -> Any:
        """What is learnt from a group, None for nothing."""
        return group

    def counts(self) -> Metrics:
        """Figures that stand beside those of `learn`."""
        return {}

    def close(self) -> None:  # noqa: B027  (most hold nothing open)
        """Called once, when no thread uses it any more."""

    def rng(self) -> np.random.Generator:
        """Random numbers of the present update."""
        return np.random.default_rng([self.seed, self.updates])
