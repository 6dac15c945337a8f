"""A multiple-choice question about the image: right, and right whatever the order of options (ACRE, GeoReason).

The prompt's metadata holds it: `choice: {question, options, answer}`, `answer` being one of 2 to 10 `options`.
Does not own: asking and shuffling (judging.protocols.agreement).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.config.judges import ChoiceOptions
from reward_servers.judging.protocols.agreement import (
    Shuffled,
    acre_reward,
    flip_rate,
    georeason_reward,
    share,
)
from reward_servers.judging.question import Picture
from reward_servers.judging.scorer import PointJudgeScorer, Row
from reward_servers.scorers.base import ScoreBatch, declared


class Choice(BaseModel):
    """The question of one prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)
    question: str
    options: list[str]
    answer: str


class JudgeChoice(PointJudgeScorer[ChoiceOptions]):
    """columns: reward in [0,1]; agreement = share of the most frequent answer over the shuffles, a judge's confidence;
    flips = share of further answers that differ from the first."""

    declares = declared("judge_choice")
    name = "judge_choice"
    paper = Shuffled.paper
    value_range = (0.0, 1.0)
    protocol: Shuffled
    settles = ("reward", "partial", "threshold")

    def make_protocol(self) -> Shuffled:
        return Shuffled(self.options.shuffles)

    def canary(self) -> ScoreBatch:
        plain = super().canary()
        choice = {"question": "Which colour is the square?", "options": ["red", "blue"], "answer": "red"}
        return ScoreBatch(plain.images, plain.prompts, ({"choice": choice},))

    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        choice = read_choice(metadata)
        answers = await self.protocol.ask(self.judge, choice.question, choice.options, (picture,))
        said = ", ".join(answers)[:1000]
        return Row((self._reward(answers, choice.answer), share(answers), flip_rate(answers)), reason=said)

    def _reward(self, answers: tuple[str, ...], truth: str) -> float:
        options = self.options
        if options.reward == "acre":
            return acre_reward(answers[0], answers[1], truth, options.partial)
        return georeason_reward(answers[0] == truth, share(answers), options.threshold)


def read_choice(metadata: dict[str, Any]) -> Choice:
    """The question in a prompt's metadata. Raises ValueError."""
    try:
        choice = Choice.model_validate(metadata.get("choice"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(("choice", *map(str, first["loc"])))
        raise ValueError(f"metadata {field}: {first['msg']}; it is {{question, options, answer}}") from error
    if choice.answer not in choice.options:
        raise ValueError(f"metadata choice.answer {choice.answer!r} is none of its options")
    return choice
