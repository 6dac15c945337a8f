"""A judge's grade from 0 to 9 as an expectation over the digit's probabilities, with its standard deviation.

Does not own: the question and its reading (judging.protocols.yes_no).
"""

from __future__ import annotations

from typing import Any

from contracts.config.judges import ScaleOptions
from reward_servers.judging.protocols.yes_no import Scale
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import declared


class JudgeScale(PointJudgeScorer[ScaleOptions]):
    """score = E[digit] / 9 in [0,1]; uncertainty = the digit's standard deviation / 9."""

    declares = declared("judge_scale")
    name = "judge_scale"
    paper = Scale.paper
    value_range = (0.0, 1.0)
    protocol: Scale

    def make_protocol(self) -> Scale:
        return Scale(self.options.question)

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        grade = await self.protocol.ask(self.judge, prompt, (picture,))
        return Row((grade.mean / 9,), deviations=(grade.deviation / 9,))
