"""PaCo-RL's consistency of an image made of panels: mean over criteria and over pairs of panels of P(yes).

Does not own: the question (judging.protocols.pairwise). A consistency between the images of a group, without a judge:
scorers/consistency.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np

from contracts.config.judges import PacoConsistencyOptions
from reward_servers.judging.protocols.pairwise import Consistency
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import ScoreBatch, declared


class PacoConsistency(PointJudgeScorer[PacoConsistencyOptions]):
    """consistency in [0,1]. Questions an image: n(n-1) times the criteria, for n panels (both orders of a pair)."""

    declares = declared("paco_consistency")
    name = "paco_consistency"
    paper = Consistency.paper
    value_range = (0.0, 1.0)
    protocol: Consistency

    def make_protocol(self) -> Consistency:
        return Consistency()

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        panels = cut(picture.pixels, self.options.rows, self.options.columns)
        protocol = self.protocol
        answers = await asyncio.gather(
            *(
                protocol.ask(self.judge, criterion, first, second)
                for criterion in self.options.criteria
                for first, second in itertools.combinations(panels, 2)
            )
        )
        return Row((float(np.mean(answers)),))

    def canary(self) -> ScoreBatch:
        """The same panel throughout."""
        one = np.full((16, 16, 3), (220, 0, 0), np.uint8)
        image = np.tile(one, (self.options.rows, self.options.columns, 1))
        return ScoreBatch(image[None], ("red squares",), ({},))


def cut(pixels: np.ndarray, rows: int, columns: int) -> list[Picture]:
    """The panels of an image, row by row. Raises ValueError when there are fewer than two or the size does not fit."""
    height, width = pixels.shape[:2]
    if rows * columns < 2 or height % rows or width % columns:
        raise ValueError(f"an image of {height}x{width} cannot be cut into {rows}x{columns} panels, two at least")
    return [
        Picture(np.ascontiguousarray(panel))
        for band in np.split(pixels, rows, axis=0)
        for panel in np.split(band, columns, axis=1)
    ]
