"""PaCo-RL (2512.04784): rewards of unequal variability are tamed before they are summed.

Over all samples of the batch h_k = std / (mean + 1e-6); a column with h_k above the threshold (mean or median of all
h, or a number) enters as log(1 + R_k), the others as they are. With equal h, and with one column, none is tamed. A
column that nobody answered has no h: it must not lower the threshold of the others.
Both forms need R >= 0: a negative score stops the run with the column's name, unless `offsets` shifts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from contracts.config.aggregation import LogTameConfig
from contracts.errors import ScoringError
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.credit.aggregation.statistics import over_batch, prefixed, spread
from learner.types import Aggregated


class LogTame(Aggregation[LogTameConfig]):
    """Stateless; which columns are tamed is decided over the batch."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        settled = {group_id: self._shifted(scores.weighted()) for group_id, scores in batch.items()}
        seen = {name: values for name, values in over_batch(settled.values()).items() if len(values)}
        variability = {name: _variability(name, values) for name, values in seen.items()}
        tamed = self._above(variability)
        rewards = {group_id: sum_terms(_tame(group, tamed)) for group_id, group in settled.items()}
        return Aggregated(rewards, prefixed("tamed", {name: float(name in tamed) for name in variability}))

    def _shifted(self, group: Settled) -> Settled:
        return replace(group, columns=tuple(replace(c, values=c.values + self._offset(c)) for c in group.columns))

    def _offset(self, column: Column) -> float:
        offsets = self.config.offsets
        return offsets.get(column.name, offsets.get(column.name.split("/")[0], 0.0))

    def _above(self, variability: Mapping[str, float]) -> set[str]:
        """Names of the columns whose variability is strictly above the threshold."""
        values = list(variability.values())
        if not values or (min(values) == max(values) and isinstance(self.config.threshold, str)):
            return set()  # not by comparison with a mean, which may miss equal values by an ulp
        if self.config.threshold == "mean":
            limit = float(np.mean(values))
        else:
            limit = float(np.median(values)) if self.config.threshold == "median" else float(self.config.threshold)
        return {name for name, value in variability.items() if value > limit}


def _variability(name: str, values: np.ndarray) -> float:
    if values.min() < 0:
        raise ScoringError(
            f"{name} answered {values.min():.4g}: log_tame needs scores of at least 0. Set "
            f"credit.aggregation.offsets['{name}'], or use credit.aggregation.name=gdpo, which needs no scale"
        )
    return spread(values) / (float(values.mean()) + 1e-6)


def _tame(group: Settled, tamed: set[str]) -> Settled:
    return replace(group, columns=tuple(
        replace(column, values=np.log1p(np.where(column.among(group.counted), column.values, 0.0)))
        if column.name in tamed else column
        for column in group.columns
    ))  # fmt: skip
