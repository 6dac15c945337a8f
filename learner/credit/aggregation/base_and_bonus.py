"""FIRM (2603.12247): base (w_b + w_q quality) / (w_b + w_q), so that quality cannot buy off a failed base.

All scores are mapped to [0,1] first; of several bonuses the smallest counts. Where a bonus is missing the group's mean
quality stands in, so that it moves the sample in neither direction (the published code pays the full bonus there: a
parse failure would be worth more than a bad quality), or the smallest bonus it has when that is less. A bonus that the
whole group lacks is left out; where no sample has all others there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from contracts.config.aggregation import BaseAndBonusConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.types import Aggregated, Rewards


class BaseAndBonus(Aggregation[BaseAndBonusConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        names = (self.config.base, *self.config.bonus)
        return Aggregated({group_id: self._group(scores.named(*names)) for group_id, scores in batch.items()})

    def _group(self, group: Settled) -> Rewards:
        base, *bonuses = group.columns
        quality = self._quality(group, bonuses)
        if self.config.fail_at is not None:
            quality = np.where(base.values <= self.config.fail_at, 0.0, quality)
        share, extra = self.config.base_share, self.config.bonus_share
        values = unit(base.values, self.config.base_range) * (share + extra * quality) / (share + extra)
        return sum_terms(Settled((Column(base.name, 1.0, base.required, values, base.valid),), group.counted))

    def _quality(self, group: Settled, bonuses: list[Column]) -> np.ndarray:
        """float64 [G] in [0,1]: the smallest of the bonuses; 0 when the group has none."""
        have = [given for column in bonuses if (given := column.among(group.counted)).any()]
        complete = np.logical_and.reduce(have) if have else np.zeros(len(group.counted), bool)
        if not complete.any():
            return np.zeros(len(group.counted))
        smallest = np.minimum.reduce([
            np.where(column.among(group.counted), unit(column.values, self.config.bonus_range), 1.0)
            for column in bonuses
        ])  # fmt: skip
        return np.where(complete, smallest, np.minimum(smallest, smallest[complete].mean()))


def unit(values: np.ndarray, score_range: tuple[float, float]) -> np.ndarray:
    """Scores mapped from their range to [0,1], clipped; NaN stays NaN."""
    low, high = score_range
    return np.clip((values - low) / (high - low), 0.0, 1.0)
