"""Size of the JPEG-compressed image, the compressibility reward of DDPO (arXiv 2305.13301) with a negative weight.

Does not own: the sign. Weight -1 rewards smooth images, weight 1 rewards busy ones.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from contracts.config.scorers import JpegSizeOptions
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer


class JpegSize(OptionScorer[JpegSizeOptions]):
    """Kilobytes (1000 bytes) of the image as a JPEG of the given PIL quality."""

    declares = declared("jpeg_size")
    name = "jpeg_size"
    paper = "DDPO (2305.13301)"
    value_range = (0.0, None)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.version = "1" if self.options.quality == 95 else f"1-q{self.options.quality}"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(np.array([self._kilobytes(image) for image in batch.images]))

    def _kilobytes(self, image: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.options.quality)
        return buffer.tell() / 1000
