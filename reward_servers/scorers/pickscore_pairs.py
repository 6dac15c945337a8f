"""PickScore's preference between two images of a group: softmax over scores, as it was trained (arXiv 2305.01569).

P(i better than j) = sigmoid(s_i - s_j), one forward an image however many pairs. Does not own: the score (pickscore).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from contracts.config.scorers import PickScorePairsOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.pairwise import PairwiseScorer
from reward_servers.scorers.pickscore import PickScoreModel


class PickScorePairs(PairwiseScorer, PickScoreModel[PickScorePairsOptions]):
    """A pair table; the prompt of the first image of a pair is the one that both are scored for."""

    declares = declared("pickscore_pairs")
    name = "pickscore_pairs"
    value_range = (0.0, 1.0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pairs = self.options.pairs

    def compare(self, batch: ScoreBatch, ordered: Sequence[tuple[int, int]]) -> np.ndarray:
        scores = PickScoreModel.score(self, batch).values[:, 0].astype(np.float64)
        first, second = np.array(ordered).T
        return 1 / (1 + np.exp(scores[second] - scores[first]))
