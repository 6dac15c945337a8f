"""Weighted sum over the columns that count: required ones as they are, optional ones centred. The default."""

from __future__ import annotations

from collections.abc import Mapping

from contracts.config.aggregation import WeightedSumConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores, sum_terms
from learner.types import Aggregated


class WeightedSum(Aggregation[WeightedSumConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        return Aggregated({group_id: sum_terms(scores.weighted(("point",))) for group_id, scores in batch.items()})
