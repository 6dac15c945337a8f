"""A run's credit: the rule from scores to rewards, then advantages. The one owner of the state of both.

Invariant: state changes once a learner step, in `aggregate`, in the order in which groups were claimed; it is JSON, and
depends on no number of ranks. Does not own: the rules (aggregation/), advantages (group.py, gae.py), when a state is
written (cluster).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contracts.errors import ConfigError
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores
from learner.credit.base import CreditEntry
from learner.types import Aggregated, Credit, CreditBatch


class RunCredit:
    """Aggregation and advantages of one run."""

    def __init__(self, aggregation: Aggregation[Any], entry: CreditEntry) -> None:
        self.aggregation, self.entry = aggregation, entry

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        """Rewards of the claimed groups that a jury scored; moves the rule's state."""
        return self.aggregation.aggregate(batch, step)

    def advantages(self, batch: CreditBatch) -> Credit:
        """Advantages of the batch; see CreditEntry."""
        return self.entry.advantages(batch)

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "aggregation": {"name": self.aggregation.config.name, "state": self.aggregation.state_dict()},
            "advantages": self.entry.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict. Raises ConfigError for the state of another rule, unless that rule kept none."""
        if not state:  # of a run folder of format 1: nothing was kept then
            return
        written, name = state["aggregation"], self.aggregation.config.name
        if written["name"] == name:
            self.aggregation.load_state_dict(written["state"])
        elif written["state"] or self.aggregation.state_dict():
            raise ConfigError(
                "credit.aggregation.name", f"{name} cannot go on from the state of {written['name']}",
                f"write {written['name']}, or start a new run from the exported weights",
            )  # fmt: skip
        self.entry.load_state_dict(state["advantages"])
