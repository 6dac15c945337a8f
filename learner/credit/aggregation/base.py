"""The contract of an aggregation rule, and how a run's rule is made.

A rule sees the score tables of a whole claimed batch and yields one reward a sample, perhaps a weight a sample or a
reward a step. It never sees how many ranks train. State, if any, changes in `aggregate` alone, once a learner step,
and is JSON. Before the claim a group is looked at by itself with a fresh rule, so the filter depends on no state.
Does not own: reading tables (columns.py), advantages (credit/group.py, credit/gae.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from contracts import registry
from contracts.config.aggregation import AggregationConfig
from learner.credit.aggregation.columns import GroupScores
from learner.types import Aggregated, Rewards

Config = TypeVar("Config")


class Aggregation(ABC, Generic[Config]):
    """From the scores of a batch to its rewards. Subclasses implement `aggregate`; those with state the last two too.

    A rule of your own takes its settings from `config.options` and declares what it needs in `declares`
    (contracts.declarations.AggregationNeeds).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        """Rewards by group id of a claimed batch; step: the learner step they are for, from 1 (0: a look ahead).

        Invalid samples (no required score) must not move what any other sample gets (law 4).
        """

    def look_ahead(self, scores: GroupScores) -> Rewards:
        """One group's rewards before the claim, by a rule with fresh state: what decides whether it holds any signal.

        A rule whose state may silence a reward for a while overrides it, or such groups would never be trained on.
        """
        return self.aggregate({0: scores}, 0).rewards[0]

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state for the checkpoint; empty when a rule keeps none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict."""


def make_aggregation(config: AggregationConfig) -> Aggregation[Any]:
    """The rule that `credit.aggregation` names, with fresh state."""
    return cast("Aggregation[Any]", registry.resolve("aggregation", config.name).load()(config))
