"""Does the judge stay with its answer: options shuffled (ACRE, GeoReason), or drawn several times (majority).

A judge that answers by position agrees with itself over P cyclic shuffles of O options no more often than chance.
Does not own: what is done with a judge that does not (reports, weights).
"""

from __future__ import annotations

import asyncio
import string
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol
from reward_servers.judging.question import Picture, Question, Undecided
from reward_servers.judging.reading import distribution

A = TypeVar("A", bound=Hashable)
MAX_OPTIONS = 10


@dataclass(frozen=True)
class Agreement(Generic[A]):
    """answer: the most frequent one; share: how often it was given, of all that were; answers: in the order asked."""

    answer: A
    share: float
    answers: tuple[A, ...]

    @property
    def flip_rate(self) -> float:
        """Share of further answers that differ from the first."""
        later = self.answers[1:]
        return sum(answer != self.answers[0] for answer in later) / len(later) if later else 0.0


class Shuffled(Protocol):
    """A multiple-choice question, asked with its options in several orders, each answer mapped back."""

    name = "shuffled"
    paper = "Answer-Consistent Chain-of-Thought RL for Multimodal LLMs (ACRE, 2510.10104)"

    async def ask(
        self, judge: Judge, question: str, options: Sequence[str], pictures: Sequence[Picture], permutations: int = 2
    ) -> Agreement[str]:
        """The option chosen most often over `permutations` cyclic shifts of 2 to 10 options.

        Raises Undecided when one order is not answered or two options tie, AttemptFailed, ValueError.
        """
        if not 2 <= len(options) <= MAX_OPTIONS or len(set(options)) != len(options):
            raise ValueError(f"2 to {MAX_OPTIONS} different options")
        if not 1 <= permutations <= len(options):
            raise ValueError(f"{len(options)} options have that many cyclic orders, not {permutations}")
        shifted = [[*options[p:], *options[:p]] for p in range(permutations)]
        answers = await asyncio.gather(*(self._one(judge, question, order, pictures) for order in shifted))
        return agreement(answers)

    async def _one(self, judge: Judge, question: str, options: Sequence[str], pictures: Sequence[Picture]) -> str:
        letters = string.ascii_uppercase[: len(options)]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        text = "\n".join([question, *lines, "Answer with the letter alone."])
        reply = await self._ask(judge, Question((*pictures, text), self.label, words=tuple(letters)))
        seen = distribution(reply, letters, judge.options.min_mass).probabilities
        best = max(seen)
        if seen.count(best) > 1:
            raise Undecided("two options are equally likely")
        return options[seen.index(best)]


def agreement(answers: Sequence[A]) -> Agreement[A]:
    """Raises Undecided when two answers are equally frequent."""
    ranked = Counter(answers).most_common(2)
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        raise Undecided(f"{ranked[0][0]!r} and {ranked[1][0]!r} were given equally often")
    return Agreement(ranked[0][0], ranked[0][1] / len(answers), tuple(answers))


async def majority(draw: Callable[[int], Awaitable[A]], samples: int) -> Agreement[A]:
    """The answer that more than half of `samples` draws gave; draws that were undecided count for none.

    draw(i): the i-th sampled answer. Raises Undecided without a majority; AttemptFailed when a draw could not be made.
    """
    drawn = await asyncio.gather(*(draw(i) for i in range(samples)), return_exceptions=True)
    for outcome in drawn:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Undecided):
            raise outcome
    answers = [outcome for outcome in drawn if not isinstance(outcome, BaseException)]
    if not answers:
        raise Undecided(f"none of {samples} samples decided")
    answer, count = Counter(answers).most_common(1)[0]
    if 2 * count <= samples:
        raise Undecided(f"no majority among {samples} samples: {count} for {answer!r}")
    return Agreement(answer, count / samples, tuple(answers))


def acre_reward(first: Hashable, second: Hashable, truth: Hashable, partial: float = 0.5) -> float:
    """1 when both answers are right, `partial` when one is, 0 when none is (ACRE)."""
    return {2: 1.0, 1: partial, 0: 0.0}[(first == truth) + (second == truth)]


def georeason_reward(right: bool, share: float, threshold: float = 1.0) -> float:
    """1[right] if the answer is stable enough, else 1[right] * share (GeoReason's logic drift)."""
    return float(right) * (1.0 if share >= threshold else share)
