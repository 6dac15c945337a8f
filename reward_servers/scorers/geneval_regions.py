"""GenEval's verdict in space: +1 in the boxes of the objects that are as asked, -1 in those that are not.

A region table for losses that act on patches (text2grad's transfer to images, with a detector in the critic's place).
What is missing has no place and no box: weigh it by `geneval` beside this. Does not own: the rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from contracts.config.scorers import GenevalRegionsOptions
from contracts.scores import Outcome, ScoreTable
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.geneval import GenevalModel
from reward_servers.scorers.parts.regions import ScoredBox, signed_map


class GenevalRegions(GenevalModel[GenevalRegionsOptions]):
    """values [N,1,h,w] in [-1,1] on the option's grid."""

    declares = declared("geneval_regions")
    name = "geneval_regions"
    value_range = (-1.0, 1.0)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        maps = [
            signed_map(self._boxes(image, metadata), self.options.grid)
            for image, metadata in zip(batch.images, batch.metadata, strict=True)
        ]
        outcomes = np.full((len(batch), 1), int(Outcome.OK), np.uint8)
        return ScoreTable(self.name, self.version, self.declares.columns, np.stack(maps)[:, None], outcomes, "region")

    def _boxes(self, image: np.ndarray, metadata: dict) -> Iterator[ScoredBox]:
        verdict = self.verdict(image, metadata)
        height, width = image.shape[:2]
        for objects, score in ((verdict.right, 1.0), (verdict.wrong, -1.0)):
            for x0, y0, x1, y1 in (one.box for one in objects):
                yield ScoredBox((x0 / width, y0 / height, x1 / width, y1 / height), score)
