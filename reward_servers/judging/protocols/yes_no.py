"""Yes or no, and a grade from 0 to 9, by the probabilities of the first token.

vqascore: P("Yes") to 'Does this figure show "..."?' (VQAScore, 2404.01291). The normalised P(yes)/(P(yes)+P(no)) is
the one of artifact-reward, paco-rl and Pref-GRPO (method catalogue, P5).
Does not own: which tokens spell a word (endpoint), when the mass is too small (reading).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol, quoted
from reward_servers.judging.question import Picture, Question
from reward_servers.judging.reading import distribution, expectation

DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class YesProbability:
    """raw: P(yes); p: P(yes) / (P(yes) + P(no)); error: what tokens not returned may change."""

    raw: float
    p: float
    error: float


@dataclass(frozen=True)
class Grade:
    """mean in [0,9] and standard deviation of the digit under the judge's probabilities."""

    mean: float
    deviation: float


class YesNo(Protocol):
    """One question with a {prompt} in it."""

    name = "yes_no"
    paper = "Evaluating Text-to-Visual Generation with Image-to-Text Generation (VQAScore, 2404.01291)"

    def __init__(self, question: str = 'Does this figure show "{prompt}"? Please answer yes or no.') -> None:
        self.question = question

    async def ask(self, judge: Judge, prompt: str, pictures: Sequence[Picture]) -> YesProbability:
        """P(yes) about pictures shown before the question. Raises Undecided or AttemptFailed."""
        text = self.question.replace("{prompt}", quoted(prompt))
        reply = await self._ask(judge, Question((*pictures, text), self.label, words=("yes", "no")))
        seen = distribution(reply, ("yes", "no"), judge.options.min_mass)
        return YesProbability(seen.probabilities[0], seen.normalised[0], seen.error)


class Scale(Protocol):
    """A digit as a grade: its expectation rather than the likeliest one, which would tie most images."""

    name = "scale"
    paper = "G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment (2303.16634)"

    def __init__(self, question: str) -> None:
        self.question = question

    async def ask(self, judge: Judge, prompt: str, pictures: Sequence[Picture]) -> Grade:
        """The grade. Raises Undecided or AttemptFailed."""
        text = self.question.replace("{prompt}", quoted(prompt))
        reply = await self._ask(judge, Question((*pictures, text), self.label, words=DIGITS))
        seen = distribution(reply, DIGITS, judge.options.min_mass)
        return Grade(*expectation(seen.normalised, [float(digit) for digit in DIGITS]))
