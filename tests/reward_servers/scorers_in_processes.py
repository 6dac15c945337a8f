"""Scorers for test_processes.py, named module:Class because other processes make them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from contracts.declarations import ScorerGives
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer


class Telling(Scorer):
    """columns: first pixel and process of each image. A first pixel of 13 kills the process; of 14 it raises."""

    declares = ScorerGives(columns=("first", "pid"))

    def load(self) -> None:
        self.version, self.weight_digest, self.value_range = "7", "abc", (0.0, None)

    def canary(self) -> ScoreBatch:
        return ScoreBatch(np.full((1, 4, 4, 3), int(self.version), np.uint8), ("sevens",), ({},))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        first = batch.images[:, 0, 0, 0]
        if (first == 13).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (first == 14).any():
            raise Unpicklable("fourteen", "no")
        self.meter("salon_judge_pairs_total", len(batch))
        return self.table(np.stack([first, np.full(len(first), os.getpid())], axis=1).astype(np.float64))


class Unpicklable(Exception):
    """Its arguments are not those of its constructor, so it cannot be made again from its pickle."""

    def __init__(self, what: str, answer: str) -> None:
        super().__init__(f"{what}: {answer}")


class Unloadable(Telling):
    """Has no weights."""

    def load(self) -> None:
        raise Unpicklable("weights", "none")


class Needy(Telling):
    """Cannot be loaded while a file is away."""

    def __init__(self, file: str) -> None:
        self.file = file

    def load(self) -> None:
        super().load()
        Path(self.file).read_text()


class Following(Telling):
    """Changes while it is served."""

    follows = True


class Grouped(Telling):
    """Compares the images of a group."""

    declares = ScorerGives(columns=("first", "pid"), whole_group=True)
