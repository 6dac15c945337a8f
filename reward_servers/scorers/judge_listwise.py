"""All images of a group marked at once by a principle in words (RewardAnything).

Does not own: the question, shuffling and reading (judging.protocols.listwise).
"""

from __future__ import annotations

import numpy as np

from contracts.config.judges import ListwiseOptions
from contracts.scores import ScoreTable
from reward_servers.judging.protocols.listwise import Listwise
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import JudgeScorer, Row, table_of_rows
from reward_servers.scorers.base import ScoreBatch, declared


class JudgeListwise(JudgeScorer[ListwiseOptions]):
    """value in [0,1] an image; uncertainty: standard deviation over shuffled orders."""

    declares = declared("judge_listwise")
    name = "judge_listwise"
    paper = Listwise.paper
    value_range = (0.0, 1.0)
    protocol: Listwise

    def make_protocol(self) -> Listwise:
        options = self.options
        return Listwise(options.principle, options.shuffles, options.reward, options.max_tokens, options.max_text)

    def canary(self) -> ScoreBatch:
        images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (64, 192)])
        return ScoreBatch(images, ("a grey square",) * 2, ({}, {}))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return table_of_rows(self, self.wait(self._all(batch)))

    async def _all(self, batch: ScoreBatch) -> list[Row]:
        whole: list[Row] = []

        async def ask() -> Row:
            pictures = [Picture(image) for image in batch.images]
            listing = await self.protocol.ask(self.judge, batch.prompts[0], pictures)
            pairs = zip(listing.values, listing.disagreement, strict=True)
            whole.extend(Row((float(value),), deviations=(float(spread),)) for value, spread in pairs)
            return Row(())

        end = await self.settle(ask())
        return whole or [end] * len(batch)
