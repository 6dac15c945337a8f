"""A checklist ticked off on a whole group, its items weighted by how few of the group pass them (VeRPO).

Does not own: plan, items and the weights' formula (judging.protocols.checklist), the sum of both columns' advantages
(credit: weights and normalisation for each reward).
"""

from __future__ import annotations

import asyncio

import numpy as np

from contracts.config.judges import ChecklistGroupOptions
from contracts.scores import Outcome, ScoreTable
from reward_servers.judging.protocols.checklist import Checklist, difficulty_weighted
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import JudgeScorer, Row, table_of_rows
from reward_servers.scorers.base import ScoreBatch, declared


class JudgeChecklistGroup(JudgeScorer[ChecklistGroupOptions]):
    """columns: dense = VeRPO's difficulty-weighted share of passed items; all = 1 if every item passes, else 0.

    The checklist is that of the group's first prompt. Pass rates are those of the images that were decided: one that
    was not has no score and moves nobody's weights.
    """

    declares = declared("judge_checklist_group")
    name = "judge_checklist_group"
    paper = "VeRPO: Verifiable Dense Reward Policy Optimization"
    value_range = (0.0, 1.0)
    protocol: Checklist
    settles = ("full_pass",)

    def make_protocol(self) -> Checklist:
        return Checklist(self.options.max_items, self.options.max_tokens, self.options.max_text)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        rows = self.wait(self._all(batch))
        decided = [index for index, row in enumerate(rows) if row.outcome is Outcome.OK]
        if decided:
            passes = np.array([rows[index].values for index in decided])
            dense = difficulty_weighted(passes, self.options.full_pass)
            for index, value, passed in zip(decided, dense, passes, strict=True):
                rows[index] = Row((float(value), float(passed.all())), reason=rows[index].reason)
        return table_of_rows(self, rows)

    async def _all(self, batch: ScoreBatch) -> list[Row]:
        """Of each image: its passes [M], or why there are none."""
        items: tuple[str, ...] = ()

        async def plan() -> Row:
            nonlocal items
            items = await self.protocol.plan(self.judge, batch.prompts[0])
            return Row(())

        planned = await self.settle(plan())
        if planned.outcome is not Outcome.OK:
            return [planned] * len(batch)
        return list(await asyncio.gather(*(self.settle(self._one(Picture(image), items)) for image in batch.images)))

    async def _one(self, picture: Picture, items: tuple[str, ...]) -> Row:
        checked = await self.protocol.tick(self.judge, items, picture)
        return Row(checked.passes.astype(float).tolist(), reason="; ".join(checked.failed)[:1000])
