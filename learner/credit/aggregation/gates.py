"""G-RA, gated rewards (2508.10548): a later reward counts only where the earlier, more important ones pass.

R = sum_j w_j g_j R_j with g_j = prod_{m<j} 1[R_m > above_m], or sigmoid((R_m - above_m) / temperature). Below a gate
the reward does not depend on anything behind it. A gate whose score is missing is unknown: what lies behind it is then
missing for that sample, neither granted nor refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from contracts.config.aggregation import GatesConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.types import Aggregated, Rewards


class Gates(Aggregation[GatesConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        names = [gate.column for gate in self.config.order]
        return Aggregated({group_id: self._group(scores.named(*names)) for group_id, scores in batch.items()})

    def _group(self, group: Settled) -> Rewards:
        size = len(group.counted)
        opening, known, certain = np.ones(size), np.ones(size, bool), True
        terms = []
        for column, gate in zip(group.columns, self.config.order, strict=True):
            # A shut gate makes the term 0 whether or not what lies behind it was scored.
            valid = known & (column.valid | (opening == 0))
            values = np.where(opening == 0, 0.0, opening * column.values)
            # Behind a gate that may be unknown a term is centred like an optional one.
            terms.append(Column(column.name, gate.weight, column.required and certain, values, valid))
            if gate.above is not None:
                opening = opening * np.where(column.valid, self._opening(column.values, gate.above), 1.0)
                known = known & (column.valid | (opening == 0))
                certain = certain and column.required
        return sum_terms(Settled(tuple(terms), group.counted))

    def _opening(self, values: np.ndarray, above: float) -> np.ndarray:
        if self.config.temperature == 0:
            return (values > above).astype(np.float64)
        return 0.5 * (1 + np.tanh((values - above) / (2 * self.config.temperature)))  # sigmoid without overflow
