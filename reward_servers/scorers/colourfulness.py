"""Colourfulness after Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003), metric M^(3)."""

from __future__ import annotations

import numpy as np

from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer, declared


class Colourfulness(Scorer):
    """0 for grey images, about 15 slightly and 82 highly colourful, above 109 extremely."""

    declares = declared("colourfulness")
    name = "colourfulness"
    paper = "Measuring colourfulness in natural images (Hasler and Suesstrunk, 2003)"
    value_range = (0.0, None)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(colourfulness(batch.images))


def colourfulness(images: np.ndarray) -> np.ndarray:
    """M^(3) of uint8 [N,H,W,3] as float64 [N].

    rg = R - G, yb = (R + G) / 2 - B;  M = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)
    """
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    axes = (1, 2)
    spread = np.sqrt(rg.var(axis=axes) + yb.var(axis=axes))
    return spread + 0.3 * np.hypot(rg.mean(axis=axes), yb.mean(axis=axes))
