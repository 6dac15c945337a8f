"""Scorers of the tests, named `module:Class` as a user's own are. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from contracts.declarations import ScorerGives
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer


class Brightness(Scorer):
    """Mean of all channels, 0 to 1, with its gradient 1/(H W 3) everywhere."""

    declares = ScorerGives(columns=("brightness",), gradients=True)
    name = "brightness"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        images = batch.images
        gradients = np.full(images.shape, 1 / images[0].size, np.float32) if batch.want_gradients else None
        return self.table(images.mean(axis=(1, 2, 3)) / 255, gradients=gradients)


class Constant(Scorer):
    """The same number for every image: no group of it has a signal."""

    declares = ScorerGives(columns=("constant",))
    name = "constant"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(np.full(len(batch), 0.5))


def refuses(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> np.ndarray:
    """A reward function that never answers."""
    raise RuntimeError("not today")
