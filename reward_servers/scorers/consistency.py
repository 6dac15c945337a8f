"""Consistency over a set: how well each image of a group fits the others (the set score of paco-rl).

c_i = mean over j != i of cos(DINO(x_i), DINO(x_j)); the mean of c over a group is the mean over its pairs. The whole
group is needed at once. paco-rl asks a VLM about each pair; a scorer of pairs by a judge stands in judging/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.config.scorers import ConsistencyOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch


class Consistency(TorchScorer[ConsistencyOptions]):
    """c [N] in [-1,1]; a group of one has no pair and fails. Against diversity: weigh it with care."""

    declares = declared("consistency")
    name = "consistency"
    paper = "PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling"
    value_range = (-1.0, 1.0)
    columns_bounded = True

    def load(self) -> None:
        from reward_servers.scorers.parts.dino import load_dino

        self.network, self.preprocess = load_dino(self.options)
        self.weighed(self.network)

    def canary(self) -> ScoreBatch:
        images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (64, 192)])
        return ScoreBatch(images, ("a grey square",) * 2, ({}, {}))

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        from reward_servers.scorers.parts.dino import embed

        if len(batch) < 2:
            raise ValueError("consistency needs a group of at least two images")
        features = embed(self.network, pixels)
        cosines = features @ features.T
        return ((cosines.sum(dim=1) - cosines.diagonal()) / (len(batch) - 1))[:, None]
