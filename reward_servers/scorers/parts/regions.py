"""Boxes with scores as a map over the image, for region tables: text2grad's, transferred to images. numpy only.

Does not own: who draws the boxes, SRUM's map of a judge's boxes (judging), what a map does to the loss (learner).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScoredBox:
    """box (x0, y0, x1, y1) as shares of the image's width and height; score in [-1,1]."""

    box: tuple[float, float, float, float]
    score: float


def signed_map(boxes: Iterable[ScoredBox], grid: tuple[int, int]) -> np.ndarray:
    """M = clip(sum of the scores of the boxes that hold a cell's centre, -1, 1), float32 [h,w]; 0 without boxes."""
    total = np.zeros(grid, np.float32)
    for one in boxes:
        total[_cells(one.box, grid)] += one.score
    return total.clip(-1, 1)


def _cells(box: tuple[float, float, float, float], grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Index of the cells whose centres lie in a box; boxes outside the image and without area have none."""
    height, width = grid
    x0, y0, x1, y1 = box
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return np.ix_(np.flatnonzero((rows >= y0) & (rows < y1)), np.flatnonzero((columns >= x0) & (columns < x1)))
