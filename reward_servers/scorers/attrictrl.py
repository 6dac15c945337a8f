"""AttriCtrl's measures of pixels: brightness (mean HSV value) and detail (entropy of the grey histogram in bits).

brightness = mean over pixels of max(R,G,B) / 255, in [0,1]; detail = -sum p log2 p over 256 grey levels, in [0,8].
Realism and safety: attrictrl_clip. A wished intensity as a reward: attrictrl_target.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer, declared

PAPER = "AttriCtrl: Fine-Grained Control of Aesthetic Attribute Intensity in Diffusion Models"


class AttriCtrl(Scorer):
    """columns brightness and detail."""

    declares = declared("attrictrl")
    name = "attrictrl"
    paper = PAPER
    value_range = (0.0, 8.0)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(np.array([[measure(image) for measure in MEASURES.values()] for image in batch.images]))


def brightness(image: np.ndarray) -> float:
    """Mean HSV value of uint8 [H,W,3] in [0,1]."""
    return float(image.max(axis=-1).mean(dtype=np.float64) / 255)


def detail(image: np.ndarray) -> float:
    """Shannon entropy in bits of the 256-bin histogram of the grey image (ITU-R 601 luma)."""
    counts = np.asarray(Image.fromarray(image).convert("L").histogram(), np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


MEASURES: dict[str, Callable[[np.ndarray], float]] = {"brightness": brightness, "detail": detail}
