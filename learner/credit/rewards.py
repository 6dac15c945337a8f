"""One group by itself, before the claim: its rewards, and whether it is ever trained.

Does not own: how scores become rewards (aggregation/), advantages (group.py, gae.py), pairs (pairs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.config.aggregation import AggregationConfig, WeightedSumConfig
from contracts.config.scoring import RewardConfig, ScorerConfig
from contracts.declarations import ObjectiveNeeds
from contracts.scores import ScoreTable
from contracts.wire import DiscardReason
from learner.credit.aggregation.base import make_aggregation
from learner.credit.aggregation.columns import group_scores
from learner.credit.pairs import best_against_worst, pairing_of
from learner.types import Rewards


def combine(
    tables: Mapping[str, ScoreTable],
    scorers: Sequence[ScorerConfig],
    group_size: int | None = None,
    aggregation: AggregationConfig | None = None,
    steps: Sequence[int] = (),
) -> Rewards:
    """One group's rewards by itself, the rule's state fresh: what the filter sees and the ledger keeps.

    tables: by scorer name; a scorer without a table has failed for the whole group. group_size: G, needed only when
    tables may be empty; aggregation: the weighted sum unless given; steps: the group's recorded steps. Raises
    ScoringError for a table that the rule cannot read.
    """
    rule = make_aggregation(aggregation or WeightedSumConfig())
    return rule.look_ahead(group_scores(tables, scorers, group_size, steps))


def filter_group(
    rewards: Rewards, reward: RewardConfig, objective: Any = None, needs: ObjectiveNeeds | None = None
) -> DiscardReason | None:
    """Why a scored group is never trained, or None when it may be claimed.

    Decided before the claim, so that a step has exactly its groups. A constant group is no signal for group-relative
    advantages; a critic still learns from it (A = R - V), so it stays when the objective has one. Objectives on pairs
    need a strict preference instead.
    """
    needs = needs or ObjectiveNeeds()
    if int(rewards.valid.sum()) < reward.min_valid:
        return DiscardReason.TOO_FEW_VALID
    if needs.unit == "pair":
        return None if best_against_worst(rewards.totals(), pairing_of(objective)) else DiscardReason.NO_PAIR
    relative = not (needs.critic or needs.reward_gradient)
    if reward.drop_zero_variance and relative and _constant(rewards):
        return DiscardReason.ZERO_VARIANCE
    return None


def _constant(rewards: Rewards) -> bool:
    values = rewards.totals()[rewards.valid]
    return bool(values.min() == values.max())
