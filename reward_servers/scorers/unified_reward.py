"""UnifiedReward (2503.05236): a model that grades images in words, behind an OpenAI-compatible endpoint.

Does not own: its prompts and their reading (judging.protocols.graded).
"""

from __future__ import annotations

from typing import Any

from contracts.config.judges import UnifiedRewardOptions
from reward_servers.judging.protocols.graded import Graded
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import declared


class UnifiedReward(PointJudgeScorer[UnifiedRewardOptions]):
    """score in [0,1]: (final - 1) / 4, or the mean of alignment, coherence and style, which `reasons` then lists."""

    declares = declared("unified_reward")
    name = "unified_reward"
    paper = Graded.paper
    value_range = (0.0, 1.0)
    protocol: Graded

    def make_protocol(self) -> Graded:
        return Graded(self.options.form, self.options.max_tokens)

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        grades = await self.protocol.ask(self.judge, prompt, picture)
        named = zip(("alignment", "coherence", "style"), grades, strict=False) if len(grades) > 1 else ()
        return Row((sum(grades) / len(grades),), reason="; ".join(f"{name} {grade:.3g}" for name, grade in named))
