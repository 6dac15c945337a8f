"""D2-Align (2512.24146): a reward corrected along a learned direction of its text embedding.

The paper scores an image against e~ = e- + omega (e+ - e-), e+ and e- the prompt's embedding moved along and against a
direction b that counters the reward model's bias. Similarity is linear in the text embedding, so the corrected score
is minus + omega (plus - minus) of the two scores: a scorer that answers both columns is all it takes. b = 0 makes the
columns equal and leaves the reward alone; omega = 1 is plus, omega = 1/2 the mean.
Does not own: learning b, which happens in the reward model's space.
"""

from __future__ import annotations

from collections.abc import Mapping

from contracts.config.aggregation import DirectionalConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores, Settled, composed, sum_terms
from learner.types import Aggregated, Rewards


class Directional(Aggregation[DirectionalConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        names = (self.config.plus, self.config.minus)
        return Aggregated({group_id: self._group(scores.named(*names)) for group_id, scores in batch.items()})

    def _group(self, group: Settled) -> Rewards:
        plus, minus = group.columns
        corrected = minus.values + self.config.strength * (plus.values - minus.values)
        return sum_terms(Settled((composed("corrected", group.columns, corrected),), group.counted))
