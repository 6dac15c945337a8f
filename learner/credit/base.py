"""The contract of a credit entry. A run takes `gae` for an objective with a critic and `group` for the others.

Credit runs once a step on the whole claimed batch, in one place that owns its state, in float64.
Does not own: rewards (rewards.py), shapes of what flows (learner/types.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from contracts.config.objectives import CreditConfig
from learner.types import Credit, CreditBatch


class CreditEntry(ABC):
    """Advantages of a batch. Subclasses implement `advantages`; entries with state also the two state methods."""

    def __init__(self, config: CreditConfig, objective: Any) -> None:
        self.config = config
        self.objective = objective

    @abstractmethod
    def advantages(self, batch: CreditBatch) -> Credit:
        """Advantages [G] or [G,K] by group id, exactly 0 for invalid samples; metrics of the batch."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state for the checkpoint; empty when an entry keeps none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (most entries have none)
        """The inverse of state_dict."""
