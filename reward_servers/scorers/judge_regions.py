"""A judge's boxes and their scores as a map over the image, for spatially weighted losses (SRUM).

Does not own: the question and the map's formula (judging.protocols.boxes).
"""

from __future__ import annotations

import asyncio

import numpy as np

from contracts.config.judges import RegionJudgeOptions
from contracts.scores import Outcome, ScoreTable
from reward_servers.judging.protocols.boxes import Boxes
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import JudgeScorer, Row
from reward_servers.scorers.base import ScoreBatch, declared


class JudgeRegions(JudgeScorer[RegionJudgeOptions]):
    """values [N,1,h,w]: the map W in [0,1], or in [-1,1] when signed."""

    declares = declared("judge_regions")
    name = "judge_regions"
    paper = Boxes.paper
    value_range = (-1.0, 1.0)
    protocol: Boxes

    def make_protocol(self) -> Boxes:
        return Boxes(self.options.thousandths, self.options.max_tokens, self.options.max_text)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        rows = self.wait(self._all(batch))
        height, width = self.options.grid
        values = np.full((len(rows), 1, height, width), np.nan, np.float32)
        for index, row in enumerate(rows):
            if row.outcome is Outcome.OK:
                values[index, 0] = np.reshape(row.values, (height, width))
        outcomes = np.array([[row.outcome] for row in rows], np.uint8)
        reasons = tuple(row.reason for row in rows)
        return ScoreTable(self.name, self.version, self.declares.columns, values, outcomes, "region", reasons=reasons)

    async def _all(self, batch: ScoreBatch) -> list[Row]:
        rows = zip(batch.images, batch.prompts, strict=True)
        return await asyncio.gather(*(self.settle(self._one(Picture(image), prompt)) for image, prompt in rows))

    async def _one(self, picture: Picture, prompt: str) -> Row:
        regions = await self.protocol.ask(self.judge, prompt, picture)
        names = "; ".join(f"{box.name} {box.score:.2g}" for box in regions.boxes)[:1000]
        return Row(regions.map(*self.options.grid, self.options.signed).reshape(-1).tolist(), reason=names)
