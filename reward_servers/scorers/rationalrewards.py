"""RationalRewards: a critique of each aspect before its score; the critique is kept as the reason.

Does not own: the form, the published text and their reading (judging.protocols.aspects).
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from contracts.config.judges import RationalRewardsOptions
from reward_servers.judging.protocols.agreement import majority
from reward_servers.judging.protocols.aspects import Aspects, AspectScores
from reward_servers.judging.question import Picture, Undecided
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import declared


class RationalRewards(PointJudgeScorer[RationalRewardsOptions]):
    """reward in [0,1]; with several samples their mean over those that decided (more than half must), and their
    standard deviation as uncertainty; with `vote: majority` the reward that more than half of them gave."""

    declares = declared("rationalrewards")
    name = "rationalrewards"
    paper = Aspects.paper
    value_range = (0.0, 1.0)
    protocol: Aspects
    settles = ("samples", "vote")

    def make_protocol(self) -> Aspects:
        return Aspects(self.options.form, self.options.temperature, self.options.max_tokens, self.options.max_text)

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        samples = self.options.samples

        async def draw(sample: int) -> AspectScores:
            return await self.protocol.ask(self.judge, prompt, picture, sample)

        if self.options.vote == "majority":
            voted = await majority(draw, samples, key=lambda scores: round(scores.reward, 6))
            return Row((voted.reward,), reason=critique(voted))
        drawn = await asyncio.gather(*(draw(i) for i in range(samples)), return_exceptions=True)
        decided = [scores for scores in drawn if isinstance(scores, AspectScores)]
        if 2 * len(decided) <= samples:
            raise next((e for e in drawn if isinstance(e, BaseException)), Undecided("no sample"))
        rewards = [scores.reward for scores in decided]
        spread = (float(np.std(rewards)),) if samples > 1 else ()
        return Row((float(np.mean(rewards)),), reason=critique(decided[0]), deviations=spread)


def critique(scores: AspectScores) -> str:
    """One line for people."""
    marks = (f"{aspect} {'N/A' if score is None else f'{score:g}'}" for aspect, score in scores.scores.items())
    words = " ".join(text for text in scores.critiques.values() if text)
    return f"{', '.join(marks)}: {words}"[:1000]
