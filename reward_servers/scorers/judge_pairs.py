"""A judge's preferences between the images of a group, both orders asked (Pref-GRPO), as a pair table.

Questions a group: G(G-1), or 2k with `pairs: k`, then a Bradley-Terry fit for the pairs not asked. A pair counts when
both orders were answered: one order alone would carry the judge's liking for a place.
Does not own: which pairs and the fit (scorers.pairwise), the question (judging.protocols.pairwise), win rates (credit).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from contracts.config.judges import JudgePairsOptions
from contracts.scores import Outcome, ScoreTable
from reward_servers.judging.protocols.pairwise import Pairwise
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import JudgeScorer, Row
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.pairwise import PairwiseScorer


class JudgePairs(PairwiseScorer, JudgeScorer[JudgePairsOptions]):
    """values[i,j,0] = P(image i is better than image j); the prompt of the group's first image is the one judged by."""

    declares = declared("judge_pairs")
    name = "judge_pairs"
    paper = Pairwise.paper
    value_range = (0.0, 1.0)
    protocol: Pairwise

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pairs = self.options.pairs

    def make_protocol(self) -> Pairwise:
        return Pairwise(self.options.answer, self.options.max_tokens)

    def canary(self) -> ScoreBatch:
        return PairwiseScorer.canary(self)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        self._rows: dict[tuple[int, int], Row] = {}
        table = PairwiseScorer.score(self, batch)
        outcomes, reasons = table.outcomes.copy(), list(table.reasons)
        for (i, j), row in self._rows.items():
            if row.outcome is not Outcome.OK and outcomes[i, j, 0] != Outcome.OK:
                outcomes[i, j, 0] = outcomes[j, i, 0] = row.outcome
                reasons[i] = reasons[i] or row.reason
        return replace(table, outcomes=outcomes, reasons=tuple(reasons))

    def compare(self, batch: ScoreBatch, ordered: Sequence[tuple[int, int]]) -> np.ndarray:
        """P(first is better) for pairs that come in both orders, one after the other."""
        pictures = [Picture(image) for image in batch.images]
        rows = self.wait(self._all(pictures, batch.prompts[0], ordered))
        self._rows = {pair: row for pair, row in zip(ordered, rows, strict=True) if row.outcome is not Outcome.OK}
        answers = np.array([row.values[0] if row.outcome is Outcome.OK else np.nan for row in rows]).reshape(-1, 2)
        self._count(answers)
        answers[~np.isfinite(answers).all(axis=1)] = np.nan
        return answers.reshape(-1)

    async def _all(self, pictures: Sequence[Picture], prompt: str, ordered: Sequence[tuple[int, int]]) -> list[Row]:
        return await asyncio.gather(*(self.settle(self._one(pictures[i], pictures[j], prompt)) for i, j in ordered))

    async def _one(self, first: Picture, second: Picture, prompt: str) -> Row:
        return Row((await self.protocol.ask(self.judge, prompt, first, second),))

    def _count(self, answers: np.ndarray) -> None:
        """answers [pairs, 2]: of both orders, each P(the one shown first is better)."""
        both = answers[np.isfinite(answers).all(axis=1)]
        flips = int(((both[:, 0] - 0.5) * (both[:, 1] - 0.5) > 0).sum())
        self.meter("salon_judge_pairs_total", len(both))
        self.meter("salon_judge_flips_total", flips)
