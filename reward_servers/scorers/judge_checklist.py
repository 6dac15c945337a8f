"""A checklist drawn up from the prompt, ticked off on the image by a judge (FIRM plan-then-score).

Does not own: plan and items (judging.protocols.checklist), products with other rewards (learner's base_and_bonus).
"""

from __future__ import annotations

from typing import Any

from contracts.config.judges import ChecklistOptions
from reward_servers.judging.protocols.checklist import Checklist
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import declared


class JudgeChecklist(PointJudgeScorer[ChecklistOptions]):
    """columns: following = mean P(yes) over the items; all = 1 if every item passes, else 0."""

    declares = declared("judge_checklist")
    name = "judge_checklist"
    paper = Checklist.paper
    value_range = (0.0, 1.0)
    protocol: Checklist

    def make_protocol(self) -> Checklist:
        return Checklist(self.options.max_items, self.options.max_tokens, self.options.max_text)

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        checked = await self.protocol.ask(self.judge, prompt, picture)
        return Row((checked.value, float(not checked.failed)), reason="; ".join(checked.failed)[:1000])
