"""GDPO: Group reward-Decoupled Normalization (2601.05242).

P = sum_k w_k (R_k - mean_G R_k) / (std_G R_k + eps), each reward by itself within its group; credit's `group` entry
with std: global then whitens P over the batch. A constant reward contributes 0, and R_k -> c R_k (c > 0) changes
nothing but eps. Conditions: an easy reward counts only where a hard one reaches a threshold, and is 0 elsewhere.
Does not own: the whitening (credit/group.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from contracts.config.aggregation import Condition, GDPOConfig
from contracts.errors import ScoringError
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.credit.aggregation.statistics import standardised
from learner.types import Aggregated, Rewards


class GDPO(Aggregation[GDPOConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        return Aggregated({group_id: self._group(scores.weighted()) for group_id, scores in batch.items()})

    def _group(self, group: Settled) -> Rewards:
        for condition in self.config.conditions:
            group = _conditioned(group, condition)
        normalised = tuple(
            replace(column, values=standardised(
                column.values, column.among(group.counted), self.config.eps, self.config.ddof
            ))
            for column in group.columns
        )  # fmt: skip
        return sum_terms(Settled(normalised, group.counted))


def _conditioned(group: Settled, condition: Condition) -> Settled:
    """The conditioned column, 0 where the deciding one is too low and missing where that is unknown.

    Too low makes it 0 whether or not it was scored, or its failure would pay. Where an optional column decides it is
    optional too: nobody is dropped because the condition could not be looked at.
    """
    decides = _find(group, condition.on)
    target = _find(group, condition.column)
    reached = decides.values >= condition.at_least
    conditioned = replace(
        target, values=np.where(reached, target.values, 0.0), valid=decides.valid & (target.valid | ~reached),
        required=target.required and decides.required,
    )  # fmt: skip
    return replace(group, columns=tuple(conditioned if column is target else column for column in group.columns))


def _find(group: Settled, name: str) -> Column:
    """By `scorer/column`, or by `scorer` when it has one weighted column (or none, because it failed)."""
    for column in group.columns:
        if name in (column.name, column.name.split("/")[0]) or column.name == name.split("/")[0]:
            return column
    known = ", ".join(column.name for column in group.columns)
    raise ScoringError(f"credit.aggregation.conditions names {name!r}; columns with a weight are {known}")
