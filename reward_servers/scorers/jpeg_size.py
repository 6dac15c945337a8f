"""Size of the JPEG-compressed image, the compressibility reward of DDPO (arXiv 2305.13301) with a negative weight.

Does not own: the sign. Weight -1 rewards smooth images, weight 1 rewards busy ones.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer, declared


class JpegSize(Scorer):
    """Kilobytes (1000 bytes) of the image as a JPEG of the given PIL quality."""

    declares = declared("jpeg_size")
    name = "jpeg_size"
    paper = "DDPO (2305.13301)"
    value_range = (0.0, None)

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality}, not within 1 to 100")
        self.quality = quality
        self.version = "1" if quality == 95 else f"1-q{quality}"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(np.array([self._kilobytes(image) for image in batch.images]))

    def _kilobytes(self, image: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000
