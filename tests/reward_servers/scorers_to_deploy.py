"""Scorers that tests deploy, found by name in replicas of their own: as cheap and as slow as they are told to be."""

from __future__ import annotations

import time

import numpy as np

from contracts.declarations import ScorerGives
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer


class Slow(Scorer):
    """The mean of each image, after `seconds` an image."""

    declares = ScorerGives(columns=("mean",))
    name = "slow"
    version = "1"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score(self, batch: ScoreBatch) -> ScoreTable:
        time.sleep(self.seconds * len(batch))
        return self.table(batch.images.mean(axis=(1, 2, 3)))


class Steady(Scorer):
    """Another number for every image, so that groups have something to learn from."""

    declares = ScorerGives(columns=("number",))
    name = "steady"
    version = "1"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(np.random.default_rng().random(len(batch), np.float32))


class Broken(Slow):
    """Cannot be loaded."""

    name = "broken"

    def load(self) -> None:
        raise RuntimeError("no weights today")


class Dated(Steady):
    """Says of itself that it is the version it was told to be."""

    name = "dated"

    def __init__(self, version: str) -> None:
        self.version = version
