"""Pref-GRPO (2508.20751): a sample's reward is the share of its group that it beats.

Win rates depend on order alone, so a tiny gap of scores is not blown up to a full advantage. They come from a pairwise
judge's table (columns.win_rates), or from point scores: more than `tie_margin` apart is a win, else each gets a half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from contracts.config.aggregation import WinRateConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms, win_rates
from learner.types import Aggregated, Rewards


class WinRate(Aggregation[WinRateConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        return Aggregated({group_id: self._group(scores) for group_id, scores in batch.items()})

    def _group(self, scores: GroupScores) -> Rewards:
        group = scores.weighted()
        judged = {name for name, table in scores.tables.items() if table.kind == "pair"}
        columns = tuple(
            column if column.name.split("/")[0] in judged else self._duels(column, group.counted)
            for column in group.columns
        )
        return sum_terms(Settled(columns, group.counted))

    def _duels(self, column: Column, counted: np.ndarray) -> Column:
        """Point scores compared with each other. A sample alone in its group has beaten nobody: one half."""
        have = column.among(counted)
        gaps = column.values[:, None] - column.values[None, :]
        wins = np.where(np.abs(gaps) <= self.config.tie_margin, 0.5, (gaps > 0).astype(np.float64))
        rates, compared = win_rates(wins, have[:, None] & have[None, :])
        return replace(column, values=np.where(compared, rates, 0.5), valid=have)
