"""VQAScore by a judge: how probable "Yes" is as the answer to whether the image shows the caption (2404.01291).

Does not own: the question and its reading (judging.protocols.yes_no), the model (a server of its own).
"""

from __future__ import annotations

from typing import Any

from contracts.config.judges import VqaScoreOptions
from reward_servers.judging.protocols.yes_no import YesNo
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import declared


class VqaScore(PointJudgeScorer[VqaScoreOptions]):
    """columns: vqascore = P(yes) as published; p_yes = P(yes) / (P(yes) + P(no)), what most rewards since use."""

    declares = declared("vqascore")
    name = "vqascore"
    paper = YesNo.paper
    value_range = (0.0, 1.0)
    protocol: YesNo

    def make_protocol(self) -> YesNo:
        return YesNo(self.options.question)

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        answer = await self.protocol.ask(self.judge, prompt, (picture,))
        return Row((min(answer.raw, 1.0), answer.p))
